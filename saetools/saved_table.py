"""A table of numbers per latent on disk: Parquet, and JSON that says where it came from and what its hash is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saetools.errors import InputError, IntegrityError
from saetools.provenance import sha256_of_file, write_json

if TYPE_CHECKING:
    import polars as pl

_TABLE = "latents.parquet"


def save_table(path: str | Path, name: str, table: pl.DataFrame, provenance: Mapping[str, Any]) -> Path:
    """Write `latents.parquet` and `NAME.json` (provenance) into a folder; the JSON is written last.

    Args:
        path: the folder, made if it is not there.
        name: what the table is, such as `attribution`.
        table: one row per latent.
        provenance: what JSON can hold.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    facts = path / f"{name}.json"
    facts.unlink(missing_ok=True)
    temporary = path / f".{_TABLE}.tmp"
    table.write_parquet(temporary)
    temporary.replace(path / _TABLE)
    write_json(facts, {"provenance": dict(provenance), "table_sha256": sha256_of_file(path / _TABLE)})
    return path


def load_table(path: str | Path, name: str) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Read the table and the provenance that `save_table` wrote.

    Raises:
        InputError: if the folder holds no table of that name.
        IntegrityError: if a file is damaged, or the table is not the one that was saved.
    """
    import polars as pl

    path = Path(path)
    facts = path / f"{name}.json"
    if not facts.is_file() or not (path / _TABLE).is_file():
        raise InputError(
            "path", expected=f"a folder with {_TABLE} and {facts.name}", received=str(path), remedy="save one there"
        )
    try:
        content = json.loads(facts.read_text(encoding="utf-8"))
        expected, provenance = content["table_sha256"], content["provenance"]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{facts} is damaged ({error!r}); make it again") from error
    if sha256_of_file(path / _TABLE) != expected:
        raise IntegrityError(f"{path / _TABLE} has changed since it was saved; make it again")
    return pl.read_parquet(path / _TABLE), provenance
