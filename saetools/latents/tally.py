"""Sums and histograms of latent activations, gathered token by token."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.sae.sparse import SparseLatents

_OCTAVE = 32  # steps of size while it halves
_STEPS = 8 * _OCTAVE
# The bits of positive floats are ordered as the floats are: 8 of exponent, then 23, of which the first 5 tell the step.
_STEP_BITS = 18


class ActivationTally:
    """Sums over tokens, and a histogram of each latent's activations, from its largest one downwards.

    Memory is 1 KiB a latent, whatever the number of tokens.

    Args:
        d_sae: latents.
    """

    def __init__(self, d_sae: int) -> None:
        self.sums = torch.zeros(d_sae, dtype=torch.float64)
        self.max = torch.zeros(d_sae)
        self.counts = torch.zeros(d_sae, _STEPS, dtype=torch.int32)
        """Activations in each step; the first one ends at the power of 2 above `max`."""

    def add(self, sparse: SparseLatents) -> None:
        """Count the active latents of some tokens."""
        used = sparse.values != 0
        latents, values = sparse.indices[used].cpu(), sparse.values[used].float().cpu()
        self.sums.index_add_(0, latents, values.double())
        sizes = values.abs_()
        self._raise_max(self.max.scatter_reduce(0, latents, sizes, "amax"))
        steps = (_first_step(self.max)[latents] - _step(sizes)).clamp_(max=_STEPS - 1)
        self.counts.view(-1).index_add_(0, latents * _STEPS + steps, torch.ones_like(steps))

    @property
    def n_active(self) -> Int[Tensor, " d_sae"]:
        """Tokens on which each latent is active."""
        return self.counts.sum(1)

    def quantile(self, q: float) -> Float[Tensor, " d_sae"]:
        """A quantile of each latent's sizes where it is active, within 1.6 % if above 1/128 of the largest.

        It is the middle of the step that holds it, or the largest size, if it is that; 0 for a latent that never fires.
        """
        cumulated = self.counts.cumsum(1, dtype=torch.int32)
        n_above = ((1 - q) * (cumulated[:, -1:] - 1)).round()
        step = _first_step(self.max) - (cumulated <= n_above).sum(1).int()
        middle = (step << _STEP_BITS | 1 << (_STEP_BITS - 1)).view(torch.float32)
        return torch.where(n_above[:, 0] > 0, torch.minimum(middle, self.max), self.max)

    def _raise_max(self, largest: Tensor) -> None:
        """Move the counts of latents whose first step is another one now."""
        further = _first_step(largest) - _first_step(self.max)
        moved = ((further > 0) & (self.max > 0)).nonzero()[:, 0]
        places = (torch.arange(_STEPS) + further[moved, None]).clamp_(max=_STEPS - 1)
        counts = self.counts[moved]
        self.counts[moved] = torch.zeros_like(counts).scatter_add_(1, places, counts)
        self.max = largest


def _step(sizes: Tensor) -> Tensor:
    return sizes.view(torch.int32) >> _STEP_BITS


def _first_step(largest: Tensor) -> Tensor:
    """The last step below the next power of 2."""
    return _step(largest) | (_OCTAVE - 1)
