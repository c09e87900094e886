"""Tensors in files, without ever running code from them, and files that are whole or not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from saetools.errors import IntegrityError


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
        raise IntegrityError(f"{file} is damaged ({error}); fetch or save the SAE again") from error


def check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Refuse tensors that are missing or have another shape.

    Raises:
        IntegrityError: naming the first of them.
    """
    for key, shape in shapes.items():
        received = tuple(tensors[key].shape) if key in tensors else "nothing"
        if received != shape:
            raise IntegrityError(f"{key} in {file}: expected shape {shape}, received {received}")


def replace_file(file: Path, write: Callable[[Path], None]) -> None:
    """Write a file under another name, then rename it."""
    temporary = file.with_suffix(".tmp")
    try:
        write(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write tensors, cast to a dtype if given; the file is whole or not there."""
    from safetensors.torch import save_file

    stored = {key: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for key, tensor in tensors.items()}
    replace_file(file, lambda temporary: save_file(stored, temporary))
