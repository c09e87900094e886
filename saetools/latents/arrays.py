"""Arrays on disk: .npy files that are written in pieces and read as memory maps, and activations in 16 bits."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, Shaped, UInt8, UInt16
from torch import Tensor

from saetools.errors import IntegrityError

SIZE_BITS = 0x7FFF  # of an activation in 16 bits, all but its sign; they are ordered as sizes are


class ArrayWriter:
    """A .npy file that is written piece by piece and gets its name when it is whole; for `with`.

    Args:
        folder: where.
        name: of the file, without `.npy`.
        dtype: of the array.
        shape: of the array; what is appended fills it.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.entry: dict[str, Any] = {"dtype": str(dtype), "shape": list(shape), "bytes": 0}
        """What a manifest says of the file; complete after the block."""
        self._dtype = dtype
        self._name = folder / f"{name}.npy"
        self._temporary = folder / f".{name}.npy.{os.getpid()}.tmp"
        self._digest = hashlib.sha256()

    def __enter__(self) -> ArrayWriter:
        self._file = self._temporary.open("wb")
        header = io.BytesIO()
        description = {"descr": self._dtype.str, "fortran_order": False, "shape": tuple(self.entry["shape"])}
        np.lib.format.write_array_header_1_0(header, description)
        self._write(header.getvalue())
        return self

    def append(self, values: Shaped[np.ndarray, "*_"]) -> None:
        """The next values, in the order of rows."""
        self._write(np.ascontiguousarray(values, self._dtype).reshape(-1).view(np.uint8).tobytes())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._file.close()
            if kind is None:
                self._temporary.replace(self._name)
                self.entry["sha256"] = self._digest.hexdigest()
        finally:
            self._temporary.unlink(missing_ok=True)

    def _write(self, raw: bytes) -> None:
        self._file.write(raw)
        self._digest.update(raw)
        self.entry["bytes"] += len(raw)


def write_arrays(folder: Path, arrays: Mapping[str, Shaped[np.ndarray, "*_"]]) -> dict[str, dict[str, Any]]:
    """Write whole arrays; returns their entries in a manifest."""
    entries = {}
    for name, array in arrays.items():
        with ArrayWriter(folder, name, array.dtype, array.shape) as file:
            file.append(array)
        entries[name] = file.entry
    return entries


def check_file(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Make sure that a file is there in its full size.

    Raises:
        IntegrityError: otherwise.
    """
    file = folder / f"{name}.npy"
    if not file.is_file() or file.stat().st_size != entry["bytes"]:
        raise IntegrityError(f"{file} is missing or damaged; index again into a new folder")


def open_array(
    folder: Path, name: str, entry: Mapping[str, Any], *, scattered: bool = False
) -> Shaped[np.ndarray, "*_"]:
    """A file as a read-only memory map.

    Args:
        folder: where.
        name: of the file, without `.npy`.
        entry: what the manifest says of it.
        scattered: whether it will be read here and there, so that the system should read no more than what is asked
            for; what it reads ahead otherwise may be a thousand times as much.

    Raises:
        IntegrityError: if it is not what its entry says.
    """
    check_file(folder, name, entry)
    try:
        array: Shaped[np.ndarray, "*_"] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise IntegrityError(f"cannot read {folder / name}.npy ({error}); index again into a new folder") from error
    if str(array.dtype) != entry["dtype"] or list(array.shape) != entry["shape"]:
        raise IntegrityError(f"{folder / name}.npy holds another array than was written; index again into a new folder")
    if scattered and sys.platform != "win32":
        array.base.madvise(mmap.MADV_RANDOM)  # type: ignore[union-attr]  # the base of a memory map is the map
    return array.view(np.ndarray)  # numpy's own class of maps is slow to index


def to_bits(values: Float[Tensor, " pair"]) -> UInt16[np.ndarray, " pair"]:
    """Activations rounded to bfloat16, as its bits: no activation becomes 0 or infinite by it."""
    return values.to("cpu", torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def from_bits(bits: UInt16[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Activations in float32 from the bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pack_texts(name: str, texts: Sequence[bytes]) -> dict[str, Shaped[np.ndarray, "*_"]]:
    """Two arrays that hold texts: all their bytes, and where each starts."""
    starts = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=starts[1:])
    return {name: np.frombuffer(b"".join(texts), np.uint8), f"{name}_starts": starts}


def texts_at(
    texts: UInt8[np.ndarray, " byte"], starts: Int[np.ndarray, " text_or_end"], indices: Integer[np.ndarray, " some"]
) -> list[bytes]:
    """Some of the texts that `pack_texts` packed."""
    spans = zip(starts[indices].tolist(), starts[indices + 1].tolist(), strict=True)
    return [texts[first:last].tobytes() for first, last in spans]
