"""Lines of JSON, with errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saetools.errors import InputError


def jsonl_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Pairs of `file:line` and the line, blank lines left out."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path.name}:{number}", line


def parse_json(line: bytes, place: str) -> Any:
    """The value of one line.

    Raises:
        InputError: at `place`, if it is not JSON in UTF-8.
    """
    text = decode(line, place)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(place, expected="one JSON object", received=str(error), remedy="mend the line") from error


def decode(raw: bytes, place: str) -> str:
    """UTF-8 text, without a byte order mark.

    Raises:
        InputError: at `place`, for other bytes.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(place, expected="UTF-8 text", received=str(error), remedy="convert it to UTF-8") from error
