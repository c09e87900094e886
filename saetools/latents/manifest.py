"""What a latent store says of itself: what it was made from, how far it is, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saetools.errors import InputError, IntegrityError
from saetools.latents.arrays import check_file
from saetools.provenance import write_json

_FILE = "manifest.json"
_CONTENT, _FORMAT = "latents", 1
_KEYS = {"models", "datasets", "d_sae", "skip_first", "stages", "done", "files"}


def new_identity(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a manifest that has to be equal for a run to continue, as it will be read back."""
    return dict(json.loads(json.dumps({"content": _CONTENT, "format": _FORMAT, **facts})))


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a folder, finished or not; `None` if there is none.

    Raises:
        IntegrityError: if it is damaged, or a file that it names is missing or has another size.
        InputError: if the folder holds something else.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / _FILE).read_text(encoding="utf-8"))
        kind = manifest.get("content"), manifest["format"]
        if kind != (_CONTENT, _FORMAT):
            raise InputError(
                "path",
                expected=f"a latent store of format {_FORMAT}",
                received=f"content {kind[0]!r} of format {kind[1]!r} in {path}",
                remedy="read it with what wrote it, or choose another folder",
            )
        if missing := _KEYS - set(manifest):
            raise KeyError(*missing)
        for name, entry in manifest["files"].items():
            check_file(path, name, entry)
    except FileNotFoundError:
        return None
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path / _FILE} is damaged ({error}); index again into a new folder") from error
    return manifest


def start_manifest(path: Path, identity: Mapping[str, Any], n_stages: int) -> dict[str, Any]:
    """The manifest of the run that this one continues, or a new one; leftovers of a killed run are removed.

    Raises:
        InputError: if the folder holds a store of something else.
        IntegrityError: as `read_manifest`.
    """
    path.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(path)
    if manifest is None:
        manifest = {**identity, "stages": n_stages, "done": 0, "files": {}}
    # Another version may give other bits: it must not continue a store, but a finished one stays what it is.
    asked = [key for key in identity if key != "versions" or not is_complete(manifest)]
    different = [key for key in asked if manifest.get(key) != identity[key]]
    if different:
        raise InputError(
            "out",
            expected="an empty folder or a store of the same models, SAE and corpus",
            received=f"{path}, which differs in {', '.join(different)}",
            remedy="choose another folder",
        )
    for leftover in (*path.glob(".*.npy.*.tmp"), *path.glob(f".{_FILE}.*.tmp"), *path.glob("unmerged-*.npy")):
        if leftover.stem not in manifest["files"]:
            leftover.unlink(missing_ok=True)
    return manifest


def advance(path: Path, manifest: dict[str, Any], written: Mapping[str, Any], obsolete: tuple[str, ...]) -> None:
    """Record the files of a finished stage, then remove those that it made obsolete."""
    manifest["files"] = {
        name: entry for name, entry in {**manifest["files"], **written}.items() if not name.startswith(obsolete)
    }
    manifest["done"] += 1
    write_json(path / _FILE, manifest)
    for prefix in obsolete:
        for file in path.glob(f"{prefix}*.npy"):
            file.unlink()


def is_complete(manifest: Mapping[str, Any]) -> bool:
    """Whether all stages are done."""
    return bool(manifest["done"] == manifest["stages"])
