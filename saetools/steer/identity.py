"""What edits are, by content: to know again what was measured under them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from saetools.models.editing import Edits, as_sequence
from saetools.sae.identity import sae_sha256
from saetools.sae.model import SAE
from saetools.steer.edits import SteeringEdit


def edits_sha256(edits: Edits, *, known: dict[int, str] | None = None) -> str:
    """Hash of edits: of every number in them, and of the SAEs; of another function than ours, of how it prints.

    Args:
        edits: by site.
        known: hashes of SAEs by their `id`, to which new ones are added; to hash each only once.
    """
    known = {} if known is None else known
    digest = hashlib.sha256()
    for site, fns in sorted(edits.items()):
        for fn in as_sequence(fns):
            digest.update(f"{site}: {fn!r}".encode())
            for part in fn.parts if isinstance(fn, SteeringEdit) else ():
                for thing in (part.change, *(condition for condition, _ in part.conditions)):
                    for value in vars(thing).values():
                        digest.update(_bytes(value, known))
    return digest.hexdigest()


def _bytes(value: Any, known: dict[int, str]) -> bytes:
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    if not isinstance(value, SAE):
        return repr(value).encode()
    if id(value) not in known:
        selector = value.nonlinearity
        settings = {name: one for name, one in vars(selector).items() if isinstance(one, int | float | str | None)}
        facts = (type(selector).__name__, settings, value.apply_b_dec_to_input, value.input_norm)
        known[id(value)] = f"{sae_sha256(value)} {facts}"
    return known[id(value)].encode()
