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


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics per latent.

    Args:
        rate: share of tokens on which it is active.
        mean: mean activation over all tokens.
        p99: 99th percentile of its activation (signs aside) where it is active; 0 where it never is.
        n_tokens: tokens counted.
        median_norm: median norm of the residual stream over these tokens.
    """

    rate: Float[Tensor, " d_sae"]
    mean: Float[Tensor, " d_sae"]
    p99: Float[Tensor, " d_sae"]
    n_tokens: int
    median_norm: float


def measure_latents(sae: SAE, blocks: Iterable[ActivationBlock], site: Site) -> LatentStatistics:
    """Statistics of every latent over blocks of activations of the base model.

    Active (latent, value) pairs are kept to be sorted, at 16 bytes each: 500 MB for a million tokens at k 32.

    Raises:
        InputError: if there are no tokens.
    """
    pairs, norms = [], []
    sums = torch.zeros(sae.d_sae, dtype=torch.float64)
    for block in blocks:
        acts = block.acts[site].to(sae.W_dec.device)
        norms.append(torch.linalg.vector_norm(acts.float(), dim=1).cpu())
        sparse = sae.encode(acts)
        sums += sparse.sums().double().cpu()
        used = sparse.values != 0
        # One integer a pair, latent above value: positive floats order as the integers of their bits do.
        bits = sparse.values[used].float().abs().view(torch.int32)
        pairs.append((sparse.indices[used] << 32 | bits).cpu())
    n_tokens = sum(map(len, norms))
    if not n_tokens:
        raise InputError("blocks", expected="at least one token", received="none", remedy="pass activations")
    ordered = torch.cat(pairs)
    ordered.numpy().sort()
    ends = torch.searchsorted(ordered, torch.arange(sae.d_sae + 1) << 32)
    counts = ends.diff()
    places = ends[:-1] + (0.99 * (counts - 1).double()).round().long()
    active = counts > 0
    p99 = torch.zeros(sae.d_sae)
    p99[active] = (ordered[places[active]] & 0xFFFFFFFF).int().view(torch.float32)
    mean = (sums / n_tokens).float()
    return LatentStatistics(counts / n_tokens, mean, p99, n_tokens, float(torch.cat(norms).median()))


def with_statistics(sae: SAE, statistics: LatentStatistics) -> SAE:
    """A copy of the SAE, on the same weights, that knows its latents' 99th percentiles and the median norm."""
    twin = copy.deepcopy(sae, {id(weight): weight for weight in sae.parameters()})
    twin.metadata = dataclasses.replace(sae.metadata, median_norm=statistics.median_norm)
    twin.p99 = statistics.p99.to(sae.W_dec.device)
    return twin.eval()
