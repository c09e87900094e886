"""A result of several tables and tensors on disk: Parquet, safetensors, and JSON with all else and their hashes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Shaped
from torch import Tensor

from saetools.errors import InputError, IntegrityError
from saetools.provenance import sha256_of_file, write_json

if TYPE_CHECKING:
    import polars as pl

_TENSORS = "tensors.safetensors"


def save_result(
    path: str | Path,
    name: str,
    tables: Mapping[str, pl.DataFrame],
    facts: Mapping[str, Any],
    *,
    tensors: Mapping[str, Shaped[Tensor, "*shape"]] | None = None,
) -> Path:
    """Write `TABLE.parquet` for each table, any tensors, and `NAME.json` into a folder; the JSON is written last.

    Args:
        path: the folder, made if it is not there.
        name: what the result is, such as `trajectory`.
        tables: by name.
        facts: what JSON can hold.
        tensors: by name.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{name}.json").unlink(missing_ok=True)
    hashes = {}
    for table, frame in tables.items():
        temporary = path / f".{table}.tmp"
        frame.write_parquet(temporary)
        temporary.replace(path / f"{table}.parquet")
        hashes[f"{table}.parquet"] = sha256_of_file(path / f"{table}.parquet")
    if tensors:
        save_file({key: value.contiguous() for key, value in tensors.items()}, path / _TENSORS)
        hashes[_TENSORS] = sha256_of_file(path / _TENSORS)
    write_json(path / f"{name}.json", {"facts": dict(facts), "sha256": hashes})
    return path


def load_result(
    path: str | Path, name: str, tables: Sequence[str], *, tensors: Sequence[str] = ()
) -> tuple[list[pl.DataFrame], dict[str, Any], list[Shaped[Tensor, "*shape"]]]:
    """Read the tables, the facts and the tensors that `save_result` wrote.

    Raises:
        InputError: if the folder holds no such result.
        IntegrityError: if a file is damaged, or not the one that was saved.
    """
    import polars as pl
    from safetensors.torch import load_file

    path = Path(path)
    files = [f"{table}.parquet" for table in tables] + ([_TENSORS] if tensors else [])
    wanted = [*files, f"{name}.json"]
    if not all((path / file).is_file() for file in wanted):
        raise InputError(
            "path", expected="a folder with " + ", ".join(wanted), received=str(path), remedy="save one there"
        )
    place = path / f"{name}.json"
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        facts, hashes = content["facts"], {file: content["sha256"][file] for file in files}
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{place} is damaged ({error!r}); make it again") from error
    if changed := [file for file, expected in hashes.items() if sha256_of_file(path / file) != expected]:
        raise IntegrityError(f"{path / changed[0]} has changed since it was saved; make it again")
    loaded = load_file(path / _TENSORS) if tensors else {}
    return (
        [pl.read_parquet(path / f"{table}.parquet") for table in tables],
        facts,
        [loaded[tensor] for tensor in tensors],
    )
