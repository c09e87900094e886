"""How often and how strongly latents fire on a reference corpus: units of clamping, base rates of a report."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.activations.stream import ActivationBlock
from saetools.errors import InputError
from saetools.models.site import Site
from saetools.sae.model import SAE
from saetools.sae.sparse import SparseLatents

_CHUNK = 4096  # tokens encoded at a time
_OCTAVE = 32  # steps of size while it halves
_STEPS = 8 * _OCTAVE
# The bits of positive floats are ordered as the floats are: 8 of exponent, then 23, of which the first 5 tell the step.
_STEP_BITS = 18


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics per latent; those of size are over its absolute value.

    Args:
        rate: share of tokens on which it is active.
        mean: mean activation over all tokens.
        max: its largest activation; 0 where it never is active.
        p99: 99th percentile of its activation where it is active, within 1.6 % (of more than 50 activations, and if
            above 1/128 of the largest); 0 where it never is.
        n_tokens: tokens counted.
        median_norm: median norm of the residual stream over these tokens.
    """

    rate: Float[Tensor, " d_sae"]
    mean: Float[Tensor, " d_sae"]
    max: Float[Tensor, " d_sae"]
    p99: Float[Tensor, " d_sae"]
    n_tokens: int
    median_norm: float


def measure_latents(
    sae: SAE, blocks: Iterable[ActivationBlock], site: Site, *, encode_dtype: torch.dtype | None = None
) -> LatentStatistics:
    """Statistics of every latent over blocks of activations of the base model.

    Memory does not grow with the tokens, but for 4 bytes each: 1 KiB a latent, and what 4096 tokens take to encode.

    Args:
        sae: the SAE.
        blocks: activations, from a stream or a store.
        site: which of them.
        encode_dtype: as for `SAE.encode`.

    Raises:
        InputError: if there are no tokens, or `encode_dtype` does not suit the SAE.
    """
    tally, norms = _Tally(sae.d_sae), []
    for block in blocks:
        for acts in torch.split(block.acts[site], _CHUNK):
            norms.append(torch.linalg.vector_norm(acts.float(), dim=1).cpu())
            tally.add(sae.encode(acts.to(sae.W_dec.device), encode_dtype=encode_dtype))
    n_tokens = sum(map(len, norms))
    if not n_tokens:
        raise InputError("blocks", expected="at least one token", received="none", remedy="pass activations")
    return LatentStatistics(
        rate=tally.counts.sum(1) / n_tokens,
        mean=(tally.sums / n_tokens).float(),
        max=tally.max,
        p99=tally.p99(),
        n_tokens=n_tokens,
        median_norm=float(torch.cat(norms).median()),
    )


class _Tally:
    """Sums over tokens, and a histogram of each latent's activations, from its largest one downwards."""

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

    def p99(self) -> Float[Tensor, " d_sae"]:
        """The middle of the step that holds the 99th percentile of the active ones; the largest, if it is that."""
        cumulated = self.counts.cumsum(1, dtype=torch.int32)
        n_above = (0.01 * (cumulated[:, -1:] - 1)).round()
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


def with_statistics(sae: SAE, statistics: LatentStatistics) -> SAE:
    """A copy of the SAE, on the same weights, that knows its latents' 99th percentiles and the median norm."""
    twin = copy.deepcopy(sae, {id(weight): weight for weight in sae.parameters()})
    twin.metadata = dataclasses.replace(sae.metadata, median_norm=statistics.median_norm)
    twin.p99 = statistics.p99.to(sae.W_dec.device)
    return twin.eval()
