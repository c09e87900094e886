"""What an edit sees of a forward pass: activations in float32 or better, and the latents that it asks about."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saetools.errors import InputError
from saetools.models.editing import Where
from saetools.sae.model import SAE

_COPIES: weakref.WeakKeyDictionary[SAE, dict[torch.device, SAE]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Asked:
    """Latents of one SAE that an edit changes, or asks about.

    Args:
        sae: the SAE.
        latents: ascending, none twice.
    """

    sae: SAE
    latents: Int[Tensor, " asked"]

    @classmethod
    def of(cls, sae: SAE, groups: Iterable[Tensor]) -> Asked:
        """All latents of some tensors."""
        latents = {latent for group in groups for latent in group.reshape(-1).tolist()}
        return cls(sae, torch.tensor(sorted(latents)))

    def columns(self, latents: Int[Tensor, "*row latent"]) -> Int[Tensor, "*row latent"]:
        """Where latents stand among those asked for."""
        return torch.searchsorted(self.latents, latents.contiguous())

    def read(self, seen: Seen) -> Float[Tensor, "row pos asked"]:
        """Their activations."""
        found = placed(self.sae, seen.x.device).encode_some(seen.tokens, self.latents.to(seen.x.device))
        return found.view(*seen.x.shape[:-1], len(self.latents))

    def written(self, seen: Seen, change: Float[Tensor, "row pos asked"]) -> Float[Tensor, "row pos d_model"]:
        """What a change of their activations adds to the output of the SAE."""
        sae = placed(self.sae, seen.x.device)
        step = change @ sae.W_dec.detach()[self.latents.to(seen.x.device)].to(change.dtype)
        scale = sae.output_scale(seen.tokens)
        return step if isinstance(scale, float) else step * scale.view(*seen.x.shape[:-1], 1)


class Seen:
    """Activations of a pass, as an edit finds them.

    Args:
        acts: activations.
        where: where they are.
    """

    def __init__(self, acts: Float[Tensor, "row pos d_model"], where: Where) -> None:
        self.where = where
        self.x = acts.to(torch.promote_types(acts.dtype, torch.float32))
        self.tokens = self.x.detach().reshape(-1, self.x.shape[-1])
        self._latents: dict[int, tuple[Asked, Tensor]] = {}

    def keep(self, asked: Asked) -> Float[Tensor, "row pos asked"]:
        """Read latents, so that conditions find them."""
        self._latents[id(asked.sae)] = asked, asked.read(self)
        return self._latents[id(asked.sae)][1]

    def is_above(self, sae: SAE, latent: int, threshold: float) -> Bool[Tensor, "row pos"]:
        """Whether a latent that was read is above a threshold."""
        asked, f = self._latents[id(sae)]
        return f[..., int(asked.columns(torch.tensor([latent])))] > threshold

    def check_width(self, width: int) -> None:
        """Refuse a direction of another model.

        Raises:
            InputError: if the residual stream is not so wide.
        """
        if self.x.shape[-1] != width:
            raise InputError(
                "direction",
                expected=f"length {self.x.shape[-1]}, the width of the residual stream",
                received=width,
                remedy="pass a direction of this model",
            )


def placed(sae: SAE, device: torch.device) -> SAE:
    """The SAE on a device; copies are kept as long as the original lives."""
    if sae.W_dec.device == device:
        return sae
    copies = _COPIES.setdefault(sae, {})
    if device not in copies:
        copies[device] = copy.deepcopy(sae).to(device)
    return copies[device]
