"""Places for output: looked at before any work is done for them, and written whole or not at all; safe text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from saetools.errors import InputError
from saetools.provenance import plain


def check_folder(path: Path, *, option: str = "--out") -> None:
    """Make sure that a folder for output can be made and written, and leave the disk as it was.

    Raises:
        InputError: if not, before any work is done for it.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            option,
            expected="a place that can be written",
            received=f"{path} ({error.strerror})",
            remedy="choose another",
        ) from error
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def check_file(path: Path, *, option: str = "--out") -> None:
    """Make sure that a file for output can be written, and leave the disk as it was.

    Raises:
        InputError: if not, before any work is done for it.
    """
    if path.is_dir():
        raise InputError(option, expected="a file", received=f"the folder {path}", remedy="name a file in it")
    check_folder(path.parent, option=option)


def printable(text: str) -> str:
    """Text of models and files made safe for a terminal: no control characters."""
    return "".join(letter for letter in text if letter.isprintable() or letter == "\n")


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object for other programs; what is not a finite number is null."""
    print(json.dumps(plain(value), indent=2, ensure_ascii=False))
