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
from saetools.latents.tally import ActivationTally
from saetools.models.site import Site
from saetools.sae.model import SAE

_CHUNK = 4096  # tokens encoded at a time


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
    tally, norms = ActivationTally(sae.d_sae), []
    for block in blocks:
        for acts in torch.split(block.acts[site], _CHUNK):
            norms.append(torch.linalg.vector_norm(acts.float(), dim=1).cpu())
            tally.add(sae.encode(acts.to(sae.W_dec.device), encode_dtype=encode_dtype))
    n_tokens = sum(map(len, norms))
    if not n_tokens:
        raise InputError("blocks", expected="at least one token", received="none", remedy="pass activations")
    return LatentStatistics(
        rate=tally.n_active / n_tokens,
        mean=(tally.sums / n_tokens).float(),
        max=tally.max,
        p99=tally.quantile(0.99),
        n_tokens=n_tokens,
        median_norm=float(torch.cat(norms).median()),
    )


def with_statistics(sae: SAE, statistics: LatentStatistics) -> SAE:
    """A copy of the SAE, on the same weights, that knows its latents' 99th percentiles and the median norm."""
    twin = copy.deepcopy(sae, {id(weight): weight for weight in sae.parameters()})
    twin.metadata = dataclasses.replace(sae.metadata, median_norm=statistics.median_norm)
    twin.p99 = statistics.p99.to(sae.W_dec.device)
    return twin.eval()
