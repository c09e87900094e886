"""A result on disk: tables as Parquet, tensors as safetensors, and JSON with all else and the hashes of everything.

Every result of the package that has tables is saved this way, in a folder of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Shaped
from torch import Tensor

from saetools.errors import InputError, IntegrityError
from saetools.provenance import plain, sha256_of_file, sha256_of_texts, write_json
from saetools.room import enough_room

if TYPE_CHECKING:
    import polars as pl

_TENSORS = "tensors.safetensors"
_HASHES = "sha256"
_FACTS = "facts"


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
        facts: what JSON can hold; `sha256` is taken.
        tensors: by name.

    Raises:
        ResourceError: if disk space runs out; the folder then holds no such result.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{name}.json").unlink(missing_ok=True)  # from here on, the folder holds no whole result
    writers: dict[str, Callable[[Path], object]] = {f"{key}.parquet": one.write_parquet for key, one in tables.items()}
    if tensors:
        rows = {key: value.contiguous() for key, value in tensors.items()}
        writers[_TENSORS] = lambda file: save_file(rows, file)
    hashes = {_FACTS: _sha256_of_facts(facts)}
    with enough_room(f"the result in {path}"):
        for file, write in writers.items():
            temporary = path / f".{file}.{os.getpid()}.tmp"
            try:
                write(temporary)
                temporary.replace(path / file)
            finally:
                temporary.unlink(missing_ok=True)
            hashes[file] = sha256_of_file(path / file)
        write_json(path / f"{name}.json", {**facts, _HASHES: hashes})
    return path


def load_result(
    path: str | Path, name: str, tables: Sequence[str], *, has_tensors: bool = False
) -> tuple[list[pl.DataFrame], dict[str, Any], dict[str, Shaped[Tensor, "*shape"]]]:
    """Read the tables, the facts and the tensors that `save_result` wrote; numbers that were not finite are null.

    Raises:
        InputError: if the folder holds no such result.
        IntegrityError: if a file is damaged, or not the one that was saved.
    """
    import polars as pl
    from safetensors.torch import load_file

    path = Path(path)
    place = path / f"{name}.json"
    files = [f"{table}.parquet" for table in tables] + ([_TENSORS] if has_tensors else [])
    wanted = [*files, place.name]
    if not all((path / file).is_file() for file in wanted):
        raise InputError(
            "path", expected="a folder with " + ", ".join(wanted), received=str(path), remedy="save one there"
        )
    try:
        facts = json.loads(place.read_text(encoding="utf-8"))
        hashes = facts.pop(_HASHES)
        expected = {file: hashes[file] for file in [*files, _FACTS]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{place} is damaged ({error!r}); make it again") from error
    found = {file: sha256_of_file(path / file) for file in files} | {_FACTS: _sha256_of_facts(facts)}
    for file, value in expected.items():
        if found[file] != value:
            changed = place if file == _FACTS else path / file
            raise IntegrityError(f"{changed} has changed since it was saved; make it again")
    return (
        [pl.read_parquet(path / f"{table}.parquet") for table in tables],
        facts,
        load_file(path / _TENSORS) if has_tensors else {},
    )


def saved_warnings(path: str | Path, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The warnings of a result that was loaded.

    Raises:
        InputError: if it was saved by a version that kept none: whether there were any is not known.
    """
    if "warnings" not in facts:
        raise InputError(
            "path", expected="a result with its warnings", received=f"an older one in {path}", remedy="make it again"
        )
    return tuple(facts["warnings"])


def _sha256_of_facts(facts: Mapping[str, Any]) -> str:
    """Of what is read back from the JSON, whatever its layout."""
    read_back = json.loads(json.dumps(plain(facts)))
    return sha256_of_texts([json.dumps(read_back, sort_keys=True)])
