"""What two models' latents did in the same conversations, side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.latents.reading import RoleReading


@dataclass(frozen=True)
class PairedReadings:
    """Mean activations of base and tuned on the same conversations, where either is not 0.

    Args:
        conversations: those with tokens at the positions, the units of statistics; their index in what was read.
        latent: of each pair, ascending.
        unit: which of the conversations, ascending within a latent.
        base: mean activation in the base.
        tuned: in the tuned model.
    """

    conversations: Int[Tensor, " unit"]
    latent: Int[Tensor, " pair"]
    unit: Int[Tensor, " pair"]
    base: Float[Tensor, " pair"]
    tuned: Float[Tensor, " pair"]

    def changes(self) -> Float[Tensor, " pair"]:
        """Tuned - base, in float64."""
        return (self.tuned - self.base).double()

    def sizes(self) -> Float[Tensor, " pair"]:
        """The larger of the two means, without its sign."""
        return torch.maximum(self.base.abs(), self.tuned.abs())


def pair_readings(base: RoleReading, tuned: RoleReading) -> PairedReadings:
    """What two models did on the same conversations, side by side."""
    units = (base.n_tokens > 0).nonzero()[:, 0]
    n = len(units)
    unit_of = torch.full((len(base.n_tokens),), -1)
    unit_of[units] = torch.arange(n)
    keys = [side.latent * n + unit_of[side.conversation] for side in (base, tuned)]
    either, place = torch.unique(torch.cat(keys), return_inverse=True)
    places = torch.split(place, [len(own) for own in keys])
    both = [
        torch.zeros(len(either)).index_copy_(0, at, side.mean) for at, side in zip(places, (base, tuned), strict=True)
    ]
    return PairedReadings(units, either // n, either % n, *both)
