"""One clear error where memory or disk space runs out."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from saetools.errors import ResourceError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")
_MEMORY_WORDS = ("can't allocate memory", "out of memory", "Cannot allocate memory")
_REMEDY = "Lower the batch, the buffer or d_sae, and run the same again"


@contextmanager
def enough_room(what: str) -> Iterator[None]:
    """Turn a lack of disk space or memory into one error.

    Args:
        what: what could not be written or computed, and what still stands.

    Raises:
        ResourceError: naming it.
    """
    try:
        yield
    except Exception as error:  # libraries in other languages raise their own kinds, with the system's words
        words = str(error)
        if getattr(error, "errno", None) in _FULL or any(each in words for each in _FULL_WORDS):
            raise ResourceError(f"no disk space for {what}. Free some, and run the same again") from error
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(each in words for each in _MEMORY_WORDS):
            raise ResourceError(f"not enough memory for {what}. {_REMEDY}") from error
        raise
