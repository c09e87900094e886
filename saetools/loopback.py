"""Names and addresses by which a machine is reached from itself only."""

from __future__ import annotations

import ipaddress

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""As they stand in an address."""


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
