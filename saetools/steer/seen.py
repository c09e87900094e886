"""What an edit sees of a forward pass: activations in float32 or better, and the latents that it asks about."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.errors import InputError
from saetools.models.where import Where
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

    def columns(self, latents: Int[Tensor, "*edit latent"]) -> Int[Tensor, "*edit latent"]:
        """Where latents stand among those asked for."""
        return torch.searchsorted(self.latents.to(latents.device), latents.contiguous())


class Seen:
    """Activations of a pass, as an edit finds them, and latents of them.

    Args:
        acts: activations.
        where: where they are.
        asked: latents that the edit depends on, at most one entry for an SAE.
    """

    def __init__(self, acts: Float[Tensor, "row pos d_model"], where: Where, asked: Sequence[Asked]) -> None:
        self.where = where
        self.x = acts.to(torch.promote_types(acts.dtype, torch.float32))
        self._tokens = self.x.detach().reshape(-1, self.x.shape[-1])
        self._latents = {id(one.sae): (one, self._read(one)) for one in asked}

    def latents(self, sae: SAE) -> Float[Tensor, "row pos asked"] | None:
        """Activations of the latents of an SAE that were asked for, in float32 or better; `None` if none were."""
        found = self._latents.get(id(sae))
        return None if found is None else found[1]

    def latent(self, sae: SAE, latent: int) -> Float[Tensor, "row pos"]:
        """Activations of one that was asked for."""
        asked, f = self._latents[id(sae)]
        return f[..., int(asked.columns(torch.tensor([latent])))]

    def written(
        self, sae: SAE, latents: Int[Tensor, "*edit latent"], change: Float[Tensor, "#row #pos latent"]
    ) -> Float[Tensor, "#row #pos d_model"]:
        """What a change of activations adds to the output of an SAE.

        Args:
            sae: the SAE.
            latents: which; with a first dimension if they differ from row to row.
            change: of their activations.
        """
        sae = placed(sae, self.x.device)
        step = change @ sae.W_dec.detach()[latents.to(self.x.device)].to(change.dtype)
        scale = sae.output_scale(self._tokens)
        return step if isinstance(scale, float) else step * scale.view(*self.x.shape[:-1], 1)

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

    def _read(self, asked: Asked) -> Float[Tensor, "row pos asked"]:
        sae = placed(asked.sae, self.x.device)
        found = sae.encode_some(self._tokens, asked.latents.to(self.x.device))
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        return found.view(*self.x.shape[:-1], len(asked.latents))


def placed(sae: SAE, device: torch.device) -> SAE:
    """The SAE on a device; copies are kept as long as the original lives."""
    if sae.W_dec.device == device:
        return sae
    copies = _COPIES.setdefault(sae, {})
    if device not in copies:
        copies[device] = copy.deepcopy(sae).to(device)
    return copies[device]
