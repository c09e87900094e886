"""Measurements that are kept as soon as they are made, so that a run which was killed goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saetools.errors import InputError, IntegrityError
from saetools.provenance import differing


class Cells:
    """Measurements by name, in memory, and in a JSONL file if one is given.

    Args:
        path: the file; it is made with the first measurement.
        identity: what the measurements belong to (settings, models, data): a file of another run is refused.

    Raises:
        InputError: if the file belongs to another run.
        IntegrityError: if it is damaged, other than by a last line that was not finished.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self._path = path
        self._identity = json.loads(json.dumps(identity))
        self._values: dict[str, Any] = {}
        if path is not None and path.exists():
            self._read(path)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def add(self, values: Mapping[str, Any]) -> None:
        """Keep some measurements, all or none of them."""
        if self._path is not None:
            new = not self._path.exists()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                if new:
                    file.write(json.dumps({"identity": self._identity}) + "\n")
                file.write(json.dumps(dict(values)) + "\n")
        self._values |= values

    def _read(self, path: Path) -> None:
        lines = path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        if len(whole) < len(lines):  # killed while it wrote
            path.write_bytes(b"".join(whole))
        if not whole:
            path.unlink()
            return
        try:
            identity, *values = (json.loads(line) for line in whole)
        except ValueError as error:
            raise IntegrityError(f"{path} is damaged ({error}); delete it and measure again") from error
        identity = identity.get("identity")
        if identity != self._identity:
            changed = differing(self._identity, identity if isinstance(identity, dict) else {})
            raise InputError(
                "out",
                expected=f"a new folder, or the measurements of this run in {path.name}",
                received="those of a run with another " + ", ".join(changed),
                remedy="choose another folder, or delete the file",
            )
        for some in values:
            self._values |= some
