"""SAEs on disk: which format a folder holds, read and written."""

from __future__ import annotations

import difflib
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch

from saetools.errors import FetchError, InputError, IntegrityError, SaetoolsError
from saetools.sae.formats import dictionary_learning, gemma_scope, llama_scope, openai, sae_lens, sparsify
from saetools.sae.formats.files import (
    BESIDE,
    STATISTICS,
    SUFFIXES,
    Checkpoint,
    entry_names,
    read_beside,
    read_config,
)
from saetools.sae.model import SAE

Format = Literal["sae_lens", "sparsify", "dictionary_learning"]

_READERS: tuple[ModuleType, ...] = (sae_lens, sparsify, dictionary_learning, gemma_scope, llama_scope, openai)
_WRITERS: dict[str, ModuleType] = {
    "sae_lens": sae_lens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
}
_KNOWN = (
    f"a folder with {sae_lens.CONFIG} and {sae_lens.WEIGHTS} (SAELens), {sparsify.CONFIG} and {sparsify.WEIGHTS} "
    f"(sparsify), {dictionary_learning.CONFIG} and {dictionary_learning.WEIGHTS} (dictionary_learning), params.npz or "
    "params.safetensors (Gemma Scope), hyperparams.json and checkpoints (Llama Scope), or OpenAI's .pt"
)
_MAX_CONFIG_BYTES = 2**24  # a JSON file beyond it is no config


def save_sae(
    sae: SAE, path: str | Path, *, format: Format = "sae_lens", storage_dtype: torch.dtype | None = None
) -> Path:
    """Write an SAE so that `load_sae` and the library of that format read it.

    What the library does not know, such as the 99th percentiles of latents, lies in files beside, which it ignores.

    Args:
        sae: what to write.
        path: folder; made if missing. The config is written last, so a folder with a config is complete. Nothing is
            written of an SAE that the format does not have.
        format: `sae_lens` takes every kind of SAE; `sparsify` takes TopK, skips included; `dictionary_learning` takes
            ReLU, TopK, Gated and JumpReLU.
        storage_dtype: dtype of the weights on disk, such as `float16` to halve the size; readers cast back.

    Returns:
        The folder.

    Raises:
        InputError: for a kind of SAE that the format does not have, or a folder that holds another format.
    """
    if format not in _WRITERS:
        raise InputError(
            "format", expected="one of " + ", ".join(_WRITERS), received=repr(format), remedy="pick one of these"
        )
    path = Path(path)
    writer = _WRITERS[format]
    others = [other.WEIGHTS for other in _WRITERS.values() if other is not writer and (path / other.WEIGHTS).exists()]
    if others:
        raise InputError(
            "path",
            expected=f"a folder for format {format} alone",
            received=f"{path}, which holds {others[0]}",
            remedy="save to another folder",
        )
    writer.save(sae, path, storage_dtype)
    return path


def load_sae(
    path_or_release: str | Path,
    *,
    sae_id: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> SAE:
    """Read an SAE of any known format from disk, or fetch one of a release that SAELens knows.

    The format is told by the names of tensors and settings: SAELens (configs from before version 6 too), sparsify,
    dictionary_learning, Gemma Scope 1 and 2, Llama Scope, OpenAI. No code from files is ever run. BatchTopK and
    Matryoshka SAEs use the threshold that training learnt.

    Args:
        path_or_release: a folder, a file of weights, or (a string that is no path here) a release on the hub.
        sae_id: which SAE of the release, or the subfolder of a local run.
        dtype: of the weights in memory.
        device: of the weights.

    Raises:
        InputError: if nothing there is an SAE, or more than one thing is; for an architecture, setting or file that is
            not supported.
        IntegrityError: if a file is damaged, shapes do not fit, or the weights are not those the config was written
            with.
        FetchError: if the hub cannot be reached.

    Example:
        >>> sae = load_sae("data/sae/smollm2-135m")
        >>> sae(torch.zeros(1, 576)).shape
        torch.Size([1, 576])
    """
    path = Path(path_or_release).expanduser()
    if isinstance(path_or_release, str) and not path.exists() and not path_or_release.startswith(("/", ".", "~")):
        sae = _from_hub(path_or_release, sae_id)
    else:
        sae = _from_disk(path / sae_id if sae_id else path)
    p99 = sae.p99
    sae = sae.to(device, dtype)
    sae.p99 = None if p99 is None else p99.to(device)  # a statistic keeps its precision
    return sae.eval().requires_grad_(False)


def sae_format(path: str | Path, *, sae_id: str | None = None) -> str:
    """In which format a file or folder holds an SAE.

    Args:
        path: a folder or a file of weights.
        sae_id: subfolder of a local run.

    Returns:
        `sae_lens`, `sparsify`, `dictionary_learning`, `gemma_scope`, `llama_scope` or `openai`.

    Raises:
        InputError: if nothing there is an SAE, or more than one thing is.
        IntegrityError: if a file is damaged.

    Example:
        >>> sae_format("data/sae/smollm2-135m")
        'sae_lens'
    """
    path = Path(path).expanduser()
    reader, _ = _find(path / sae_id if sae_id else path)
    return reader.__name__.rpartition(".")[2]


def _from_disk(path: Path) -> SAE:
    reader, checkpoint = _find(path)
    try:
        sae: SAE = reader.load(checkpoint)
    except SaetoolsError:
        raise
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        at_fault = checkpoint.config_file or checkpoint.file
        raise IntegrityError(f"{at_fault} is damaged ({error!r}); fetch or save the SAE again") from error
    read_beside(sae, checkpoint.file)
    return sae


def _find(path: Path) -> tuple[ModuleType, Checkpoint]:
    """The one SAE that a file or folder holds, and the format it is in."""
    if path.is_file():
        found = _readings(path) if path.suffix in SUFFIXES else []
        if found:
            return found[0]
        raise InputError("path", expected=_KNOWN, received=_describe([path]), remedy="check what wrote this file")
    for folder in (path, path / "checkpoints"):
        files = _weight_files(folder)
        by_file, problems = {}, []
        for file in files:
            try:
                if found := _readings(file):
                    by_file[file] = found[0]
            except SaetoolsError as error:
                problems.append(error)
        if len(by_file) > 1:
            raise InputError(
                "path",
                expected="one SAE",
                received=f"{len(by_file)} in {folder}: " + ", ".join(file.name for file in by_file),
                remedy=f"name the file, such as {next(iter(by_file))}",
            )
        if by_file:
            return next(iter(by_file.values()))
        if problems:
            raise problems[0]
    if inside := _folders_inside(path):
        shown = ", ".join(inside[:20]) + (", ..." if len(inside) > 20 else "")
        raise InputError(
            "path",
            expected="one SAE",
            received=f"{path}, whose {len(inside)} subfolders hold weights: {shown}",
            remedy=f"pass sae_id={inside[0]!r}, or the path of that folder",
        )
    files = _weight_files(path)
    received = _describe(files) if files else f"{path}, which " + ("has no weights" if path.exists() else "is missing")
    raise InputError("path", expected=_KNOWN, received=received, remedy="point at an SAE of one of these formats")


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.name != STATISTICS)


def _readings(file: Path) -> list[tuple[ModuleType, Checkpoint]]:
    """How a file of weights can be read: with settings beside it, one folder up, or without any."""
    names, damaged = entry_names(file), dict[str, IntegrityError]()
    for folder in (file.parent, file.parent.parent):
        found = []
        for config_file in sorted(folder.glob("*.json")):
            if config_file.name == BESIDE or config_file.stat().st_size > _MAX_CONFIG_BYTES:
                continue
            try:
                checkpoint = Checkpoint(file, names, read_config(config_file), config_file)
            except IntegrityError as error:
                if folder == file.parent:
                    damaged[config_file.name] = error
                continue
            found += [(reader, checkpoint) for reader in _READERS if reader.matches(checkpoint)]
        # Where keys leave a choice, the name that the library itself gives decides.
        named = [(reader, c) for reader, c in found if c.config_file and c.config_file.name == _config_name(reader)]
        if len(found) > 1 and len(named) != 1:
            raise InputError(
                "path",
                expected="one config that fits the weights",
                received=f"{', '.join(c.config_file.name for _, c in found if c.config_file)} beside {file}",
                remedy="keep one of them",
            )
        if found:
            return named or found
    bare = Checkpoint(file, names)
    found = [(reader, bare) for reader in _READERS if reader.matches(bare)]
    for name, problem in damaged.items():
        if not found or any(name == _config_name(reader) for reader, _ in found):
            raise problem
    return found


def _config_name(reader: ModuleType) -> str:
    return getattr(reader, "CONFIG", "")


def _describe(files: list[Path]) -> str:
    """Files by what they hold, which is what a format is told by."""
    lines = []
    for file in files[:3]:
        names = sorted(entry_names(file))[:8] if file.suffix in SUFFIXES else ["no tensors"]
        lines.append(f"{file} ({', '.join(names)})")
    configs = sorted(config.name for config in files[0].parent.glob("*.json") if config.name != BESIDE)
    return "; ".join(lines) + f" with {', '.join(configs[:5]) or 'no config'}"


def _folders_inside(path: Path) -> list[str]:
    """Subfolders with weights, down to the depth at which releases keep them, in the order people count."""
    for pattern in ("*/*", "*/*/*", "*/*/*/*"):
        found = {str(file.parent.relative_to(path)) for file in path.glob(pattern) if file.suffix in SUFFIXES}
        if found:
            return sorted(found, key=lambda name: [int(part) if part.isdigit() else part for part in _parts(name)])
    return []


def _parts(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


def _from_hub(release: str, sae_id: str | None) -> SAE:
    """An SAE that SAELens can fetch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports
        import sae_lens as library
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    releases = get_pretrained_saes_directory()
    if release not in releases and (sae_id is None or "/" not in release):
        near = difflib.get_close_matches(release, releases, n=3)
        raise InputError(
            "path_or_release",
            expected="a path, a release that SAELens knows, or a repository of the hub with an sae_id",
            received=f"{release!r}, which is no path here and not among SAELens' {len(releases)} releases",
            remedy=f"check the spelling{': near to it are ' + ', '.join(near) if near else ''}",
        )
    known = list(releases[release].saes_map) if release in releases else []
    if known and sae_id not in known:
        near = difflib.get_close_matches(str(sae_id), known, n=3) or known[:3]
        raise InputError(
            "sae_id",
            expected=f"one of the {len(known)} SAEs of {release}",
            received=repr(sae_id),
            remedy="pick one, such as " + ", ".join(near),
        )
    try:
        theirs = library.SAE.from_pretrained(release, str(sae_id), device="cpu")
    except Exception as error:  # whatever network, hub and SAELens raise
        raise FetchError(
            f"{release!r} is no path here, and SAELens could not fetch {sae_id!r} of it from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); connect, or copy its files "
            "here and load their folder"
        ) from error
    return sae_lens.from_sae_lens(theirs, f"{release}/{sae_id}")
