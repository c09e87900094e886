"""Who may look: requests by other names than the server's, from foreign pages, or without the token are refused."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

_COOKIE = "saetools-token"
_NOTEBOOKS = "http://localhost:* http://127.0.0.1:* vscode-webview:"
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors {frames}",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def protect(server: Any, *, hosts: Sequence[str], token: str | None, framed: bool = False) -> None:
    """Have a Flask server ask who asks, before anything is read.

    Args:
        server: the Flask application.
        hosts: names by which it is called, without ports; a page that was rebound to this address calls it by another.
            `*` lets all names pass, where a token says who may look.
        token: what `?token=` has to say once, and a cookie from then on; `None` asks for none.
        framed: let notebooks of this machine show it in a frame.
    """
    from flask import Response, redirect, request

    headers = {name: text.format(frames=_NOTEBOOKS if framed else "'self'") for name, text in _HEADERS.items()}
    known = {host.strip("[]") for host in hosts}

    @server.before_request  # type: ignore[untyped-decorator]
    def check() -> Any:
        origin = urlsplit(request.headers.get("Origin", "")).hostname
        names = {urlsplit(f"//{request.host}").hostname, *([] if origin is None else [origin])}
        if "*" not in known and not names <= known:
            return Response("this address is called by another name", 403)
        if token is None:
            return None
        given = request.args.get("token")
        if given is not None and secrets.compare_digest(given.encode(), token.encode()):
            answer = redirect("/")
            answer.set_cookie(_COOKIE, token, httponly=True, samesite="Strict")
            return answer
        if not secrets.compare_digest(request.cookies.get(_COOKIE, "").encode(), token.encode()):
            return Response("open the address that saetools explore printed: it holds the token", 401)
        return None

    @server.after_request  # type: ignore[untyped-decorator]
    def harden(response: Any) -> Any:
        response.headers.update(headers)
        return response
