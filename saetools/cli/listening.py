"""What commands that serve have in common: where they listen, and who may ask."""

from __future__ import annotations

import os

from saetools.errors import InputError
from saetools.loopback import LOOPBACK, is_loopback

_TOKEN_VARIABLE = "SAETOOLS_TOKEN"


def token() -> str | None:
    """The secret that clients have to know, if there is one."""
    return os.environ.get(_TOKEN_VARIABLE) or None


def check_listening(host: str, port: int, *, secret: str) -> None:
    """Refuse ports that there are not, and addresses that others reach if anyone may ask.

    Args:
        host: address.
        port: its port.
        secret: what users call the token.

    Raises:
        InputError: for either.
    """
    if not 0 <= port < 65536:
        raise InputError("--port", expected="0 to 65535", received=port, remedy="pick another")
    if not is_loopback(host) and token() is None:
        raise InputError(
            "--host",
            expected=f"this machine, such as 127.0.0.1, or a {secret} in {_TOKEN_VARIABLE}",
            received=f"{host} without a {secret}",
            remedy=f"set {_TOKEN_VARIABLE}: whoever reaches the address can use the model",
        )


def names_of(host: str, others: tuple[str, ...]) -> tuple[str, ...]:
    """Names by which a server may be called: any, where it is reached from elsewhere and the token says who may ask.

    Args:
        host: its address.
        others: further names.
    """
    return (*LOOPBACK, *others, *(("*",) if token() is not None and not is_loopback(host) else ()))


def in_address(host: str) -> str:
    """A host as it stands in an address."""
    return f"[{host}]" if ":" in host else host
