"""The `saetools` command."""

from saetools.cli.main import main

__all__ = ["main"]
