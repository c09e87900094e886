"""How often and how strongly latents fire on a reference corpus: units of clamping, base rates of a report."""

from __future__ import annotations

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
        p99: 99th percentile of its activation where it is active; 0 where it never is.
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

    Only active (latent, value) pairs are kept, about 12 bytes each: 400 MB for a million tokens at k 32.

    Raises:
        InputError: if there are no tokens.
    """
    latents, values, norms = [], [], []
    for block in blocks:
        acts = block.acts[site].to(sae.W_dec.device)
        norms.append(acts.float().norm(dim=1).cpu())
        sparse = sae.encode(acts)
        active = sparse.values > 0
        latents.append(sparse.indices[active].int().cpu())
        values.append(sparse.values[active].float().cpu())
    n_tokens = sum(map(len, norms))
    if not n_tokens:
        raise InputError("blocks", expected="at least one token", received="none", remedy="pass activations")
    all_latents, all_values = torch.cat(latents).long(), torch.cat(values)
    counts = torch.bincount(all_latents, minlength=sae.d_sae)
    sums = torch.zeros(sae.d_sae).index_add_(0, all_latents, all_values)
    by_value = torch.argsort(all_values)
    ordered = all_values[by_value][torch.argsort(all_latents[by_value], stable=True)]
    starts = counts.cumsum(0) - counts
    places = (starts + (0.99 * (counts - 1).clamp_min(0)).round().long()).clamp_max(max(len(ordered) - 1, 0))
    p99 = torch.where(counts > 0, ordered[places], 0.0) if len(ordered) else torch.zeros(sae.d_sae)
    return LatentStatistics(counts / n_tokens, sums / n_tokens, p99, n_tokens, float(torch.cat(norms).median()))


def with_statistics(sae: SAE, statistics: LatentStatistics) -> SAE:
    """A copy of the SAE, on the same weights, that knows its latents' 99th percentiles and the median norm."""
    metadata = dataclasses.replace(sae.metadata, median_norm=statistics.median_norm)
    twin = SAE(
        sae.d_in,
        sae.d_sae,
        sae.nonlinearity,
        apply_b_dec_to_input=sae.apply_b_dec_to_input,
        metadata=metadata,
        device="meta",
    )
    twin.encoder, twin.W_dec, twin.b_enc, twin.b_dec = sae.encoder, sae.W_dec, sae.b_enc, sae.b_dec
    twin.p99 = statistics.p99.to(sae.W_dec.device)
    return twin.eval()
