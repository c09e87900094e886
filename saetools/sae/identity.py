"""Which SAE this is, and where it reads."""

from __future__ import annotations

import hashlib

import torch

from saetools.errors import InputError
from saetools.models.site import Site
from saetools.sae.model import SAE


def sae_site(sae: SAE) -> Site:
    """The site an SAE was trained on, by its metadata.

    Raises:
        InputError: if the metadata does not say.
    """
    if not sae.metadata.site:
        raise InputError(
            "site", expected="a site", received="none, and the SAE does not name its own", remedy="pass site="
        )
    return Site.parse(sae.metadata.site)


def sae_sha256(sae: SAE) -> str:
    """SHA-256 over the weights of an SAE in memory, in hexadecimal."""
    digest = hashlib.sha256()
    for weight in sae.parameters():
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
