"""The `saetools` command."""

from saetools.cli.entry import main

__all__ = ["main"]
