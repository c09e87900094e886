"""Files of tensors, read without ever running code from them, and written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetools.errors import InputError, IntegrityError
from saetools.provenance import sha256_of_file, write_json
from saetools.sae.model import SAE, InputNorm, SAEMetadata
from saetools.sae.nonlinearity import Nonlinearity

_PICKLED = (".pt", ".pth")
SUFFIXES = (".safetensors", ".npz", *_PICKLED)
_CODE = re.compile(r"nsupported global|allow_pickle|unrecognized function|Can only build|TorchScript", re.IGNORECASE)
"""How torch and numpy say that reading on would call something."""
STATISTICS, BESIDE = "latent_statistics.safetensors", "saetools.json"


@dataclass(frozen=True)
class Checkpoint:
    """A file of tensors and the settings that lie with it; the tensors themselves are read when asked for."""

    file: Path
    """The tensors."""
    names: frozenset[str]
    """What the file holds at its top level."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Settings from a JSON file; empty where there is none."""
    config_file: Path | None = None
    """That JSON file."""

    def entries(self) -> dict[str, Any]:
        """All that the file holds: tensors, and plain values in a pickled file."""
        return _read_entries(self.file)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, in float32 or, where they are stored so, in float64."""
        return float_tensors(self.entries(), copy=self.file.suffix in _PICKLED)


def entry_names(file: Path) -> frozenset[str]:
    """Names of what a file of tensors holds, read without its tensors where the format allows.

    Raises:
        InputError: for a file that would run code.
        IntegrityError: if it is damaged.
    """
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                return frozenset(opened.keys())
        except (OSError, SafetensorError) as error:
            raise _damaged(file, error) from error
    if file.suffix == ".npz":
        try:
            with zipfile.ZipFile(file) as archive:
                return frozenset(name.removesuffix(".npy") for name in archive.namelist())
        except (OSError, zipfile.BadZipFile) as error:
            raise _damaged(file, error) from error
    return frozenset(_read_pickled(file))


def _read_entries(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        return dict(read_safetensors(file))
    return _read_npz(file) if file.suffix == ".npz" else _read_pickled(file)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        IntegrityError: if it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise _damaged(file, error) from error


def _read_npz(file: Path) -> dict[str, Any]:
    import numpy as np

    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except Exception as error:  # whatever the bytes lead it to
        if _CODE.search(str(error)):
            raise _holds_code(file, error) from error
        raise _damaged(file, error) from error


def _read_pickled(file: Path) -> dict[str, Any]:
    try:
        entries = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # whatever the bytes lead it to
        if _CODE.search(str(error)):
            raise _holds_code(file, error) from error
        raise _damaged(file, error) from error
    if not isinstance(entries, Mapping) or not all(isinstance(name, str) for name in entries):
        raise InputError(
            "path",
            expected="a file that maps names to tensors",
            received=f"{type(entries).__name__} in {file}",
            remedy="save the state_dict() of the SAE",
        )
    return dict(entries)


def _damaged(file: Path, error: Exception) -> IntegrityError:
    return IntegrityError(f"{file} is damaged ({_first_line(error)}); fetch or save the SAE again")


def _holds_code(file: Path, error: Exception) -> InputError:
    return InputError(
        "path",
        expected="a file of tensors and plain values",
        received=f"{file}, which holds objects that run code when read ({_first_line(error)})",
        remedy="where you trust it, load it with its own library and save the state_dict()",
    )


def _first_line(error: Exception) -> str:
    """The start of a library's message, which may go on for pages; the class where there is none."""
    text = " ".join(str(error).split()) or type(error).__name__
    found = re.search(r"unsupported \w+:?[^.]*\.?\w*", text, re.IGNORECASE)
    return found[0] if found else text[:160]


def float_tensors(entries: Mapping[str, Any], *, copy: bool = True) -> dict[str, Tensor]:
    """The tensors among entries, in float32 or, where they are stored so, in float64.

    The memory of a pickled file's tensors is the file itself; a copy does not change with it.
    """
    return {
        name: value.to(torch.float64 if value.dtype == torch.float64 else torch.float32, copy=copy)
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }


def read_config(file: Path) -> dict[str, Any]:
    """A JSON object of settings.

    Raises:
        IntegrityError: if it is damaged or holds something else.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(file, error) from error
    if not isinstance(config, dict):
        raise IntegrityError(f"{file} is damaged (it holds no object); fetch or save the SAE again")
    return config


def width(tensors: Mapping[str, Tensor], key: str, file: Path) -> int:
    """Length of a vector.

    Raises:
        IntegrityError: if it is missing or no vector.
    """
    if key not in tensors or tensors[key].ndim != 1:
        received = tuple(tensors[key].shape) if key in tensors else "nothing"
        raise IntegrityError(f"{key} in {file}: expected a vector, received {received}")
    return len(tensors[key])


def check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Refuse tensors that are missing or have another shape.

    Raises:
        IntegrityError: naming the first of them.
    """
    for key, shape in shapes.items():
        received = tuple(tensors[key].shape) if key in tensors else "nothing"
        if received != shape:
            hint = "; it is transposed" if received == shape[::-1] else ""
            raise IntegrityError(f"{key} in {file}: expected shape {shape}, received {received}{hint}")


def refuse_unknown(names: Mapping[str, Any], known: Mapping[str, Any], file: Path) -> None:
    """Refuse tensors that nothing is known about: what they would change is lost otherwise.

    Raises:
        InputError: naming them.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            "path",
            expected="weights " + ", ".join(known),
            received=f"also {', '.join(unknown)} in {file}",
            remedy="fold what is beyond these into them",
        )


def assemble(
    nonlinearity: Nonlinearity,
    *,
    encoder: Tensor,
    W_dec: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    W_skip: Tensor | None = None,
    apply_b_dec_to_input: bool,
    input_norm: InputNorm = "none",
    metadata: SAEMetadata = SAEMetadata(),
) -> SAE:
    """An SAE around tensors that are there already; `encoder` and `W_dec` have a row per latent."""
    sae = SAE(
        encoder.shape[1],
        W_dec.shape[0],
        nonlinearity,
        d_out=W_dec.shape[1],
        apply_b_dec_to_input=apply_b_dec_to_input,
        input_norm=input_norm,
        skip=W_skip is not None,
        metadata=metadata,
        device="meta",
    )
    weights = {"encoder": encoder, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    for name, weight in (weights if W_skip is None else {**weights, "W_skip": W_skip}).items():
        setattr(sae, name, torch.nn.Parameter(weight.contiguous()))
    return sae


def replace_file(file: Path, write: Callable[[Path], None]) -> None:
    """Write a file under another name, then rename it."""
    temporary = file.with_suffix(".tmp")
    try:
        write(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def to_store(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor as a file takes it, cast to a dtype if given."""
    return tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write tensors, cast to a dtype if given; the file is whole or not there."""
    from safetensors.torch import save_file

    stored = {key: to_store(tensor, dtype) for key, tensor in tensors.items()}
    replace_file(file, lambda temporary: save_file(stored, temporary))


def write_statistics(sae: SAE, folder: Path) -> None:
    """Write the 99th percentiles, which no other library knows; without any, an old file goes."""
    (folder / STATISTICS).unlink(missing_ok=True)
    if sae.p99 is not None:
        write_safetensors(folder / STATISTICS, {"p99": sae.p99}, torch.float32)


def read_statistics(sae: SAE, folder: Path) -> None:
    """Give a new SAE the 99th percentiles that lie in its folder, if any do.

    Raises:
        IntegrityError: if they have another length.
    """
    if not (folder / STATISTICS).is_file():
        return
    p99 = read_safetensors(folder / STATISTICS).get("p99")
    if p99 is None or p99.shape != (sae.d_sae,):
        raise IntegrityError(f"{folder / STATISTICS} does not belong to these weights; delete it or save the SAE again")
    sae.p99 = p99


def write_beside(sae: SAE, weights: Path) -> None:
    """Write what another library's files have no place for into files of our own, which that library ignores."""
    write_statistics(sae, weights.parent)
    write_json(
        weights.parent / BESIDE,
        {"weights": weights.name, "weights_sha256": sha256_of_file(weights), **dataclasses.asdict(sae.metadata)},
    )


def read_beside(sae: SAE, weights: Path) -> None:
    """Give a new SAE what `write_beside` wrote about these weights, if it did.

    Raises:
        IntegrityError: if the weights are others than then.
    """
    if not (weights.parent / BESIDE).is_file():
        return
    beside = read_config(weights.parent / BESIDE)
    if beside.get("weights") != weights.name:
        return
    if beside.get("weights_sha256") != sha256_of_file(weights):
        raise IntegrityError(f"{weights} is not the file that {BESIDE} was written with; save it again")
    sae.metadata = known_metadata(beside)
    read_statistics(sae, weights.parent)


def known_metadata(stored: Mapping[str, Any]) -> SAEMetadata:
    """Metadata from a JSON object that may hold more."""
    names = {field.name for field in dataclasses.fields(SAEMetadata)}
    return SAEMetadata(**{key: value for key, value in stored.items() if key in names})
