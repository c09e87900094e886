"""What edits are, by content: to know again what was measured under them."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor

from saetools.models.editing import Edits, as_sequence
from saetools.sae.identity import sae_sha256
from saetools.sae.model import SAE
from saetools.steer.edits import SteeringEdit


def edits_sha256(edits: Edits) -> str:
    """Hash of edits: of every number in them, and of the SAEs; of another function than ours, of how it prints."""
    digest = hashlib.sha256()
    for site, fns in sorted(edits.items()):
        for fn in as_sequence(fns):
            digest.update(f"{site}: {fn!r}".encode())
            for part in fn.parts if isinstance(fn, SteeringEdit) else ():
                for thing in (part.change, *(condition for condition, _ in part.conditions)):
                    for value in vars(thing).values():
                        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Any) -> bytes:
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous().numpy().tobytes()
    return sae_sha256(value).encode() if isinstance(value, SAE) else repr(value).encode()
