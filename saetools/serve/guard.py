"""Who may ask, and how much: checked before a request is read."""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from saetools.serve.schema import error_body

_App = Callable[[Any, Any, Any], Awaitable[None]]


class TooLargeError(Exception):
    """A request has more bytes than the server reads."""


class Guard:
    """ASGI middleware that refuses requests without the key, from foreign web pages, or that are too large.

    Args:
        app: what it stands before.
        token: what clients have to send as their API key; `None` asks for none.
        hosts: names by which the server is called; pages of other origins are refused, unless `*` is among them.
        most_bytes: of a request's body.
    """

    def __init__(self, app: _App, *, token: str | None, hosts: Sequence[str], most_bytes: int) -> None:
        self._app, self._token, self._hosts, self._most_bytes = app, token, hosts, most_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if self._token is not None and not secrets.compare_digest(given.encode(), self._token.encode()):
            await _refuse(send, 401, "the API key is missing or wrong", "authentication_error")
            return
        origin = urlsplit(headers.get("origin", "")).hostname
        if origin is not None and origin not in {host.strip("[]") for host in self._hosts} and "*" not in self._hosts:
            await _refuse(send, 403, f"pages of {origin} may not ask", "permission_error")
            return
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdecimal() or int(length) > self._most_bytes:
            await self._refuse_size(send)
            return
        n_bytes = 0

        async def counted() -> Any:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._most_bytes:
                raise TooLargeError
            return message

        async def sent(message: Any) -> None:
            if n_bytes <= self._most_bytes:  # what the application makes of the error is not told
                await send(message)

        with suppress(TooLargeError):
            await self._app(scope, counted, sent)
        if n_bytes > self._most_bytes:
            await self._refuse_size(send)

    async def _refuse_size(self, send: Any) -> None:
        await _refuse(send, 413, f"more than {self._most_bytes} bytes", "invalid_request_error")


async def _refuse(send: Any, status: int, message: str, kind: str) -> None:
    body = json.dumps(error_body(message, kind)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
