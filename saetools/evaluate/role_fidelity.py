"""Figures of an SAE at the positions of one token role, and the sums over tokens from which they are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from saetools.data.roles import POSITIONS, Positions, select_positions
from saetools.sae.model import SAE
from saetools.stats import Estimate, estimate_ratios

DENSE_RATE = 0.1
"""A latent that is active on a larger share of tokens is called dense."""
FREQUENCY_EDGES = tuple(exponent / 2 for exponent in range(-12, 1))
"""Edges of the histogram of firing frequencies: log10 of the share of tokens, from 1e-6 to 1 in half decades."""


@dataclass(frozen=True)
class RoleFidelity:
    """Fidelity at the positions of one token role.

    Cross-entropies (`ce`, of the next token) and Kullback-Leibler divergences (`kl`, from the clean model) are in nats
    a token. `sae`, `mean` and `zero` tell what stands in place of the residual, whatever the role: the reconstruction
    x', the mean residual of all positions, or zeros.

    Args:
        fvu: fraction of variance unexplained, sum ||x - x'||^2 / sum ||x - mean x||^2, the mean being that of the role.
            Its interval takes the mean as given.
        explained_variance: 1 - fvu.
        cosine: mean cosine of x and x'.
        norm_ratio: mean of ||x'|| / ||x||.
        l0: mean number of active latents.
        ce_clean: of the model as it is.
        ce_sae: with x'.
        ce_mean: with the mean.
        ce_zero: with zeros.
        ce_recovered: (ce_zero - ce_sae) / (ce_zero - ce_clean); 1 is perfect.
        ce_recovered_mean: the same against `ce_mean`.
        kl: with x'.
        kl_mean: with the mean.
        kl_zero: with zeros.
        kl_recovered: 1 - kl / kl_zero.
        kl_recovered_mean: 1 - kl / kl_mean.
        dead: share of latents that fired on no position. It has no interval: resamples of the same conversations can
            only lose latents.
        dense: share of latents that fired on more than `DENSE_RATE` of the positions.
        histogram: live latents by the share of positions on which they fire, between `FREQUENCY_EDGES`; what fires on
            less than the first edge is in the first bin.
        n_conversations: conversations with positions of the role, over which intervals resample.
        n_tokens: positions.
        n_predictions: those with a next token, which cross-entropies count; all else counts all positions.
    """

    fvu: Estimate
    explained_variance: Estimate
    cosine: Estimate
    norm_ratio: Estimate
    l0: Estimate
    ce_clean: Estimate
    ce_sae: Estimate
    ce_mean: Estimate
    ce_zero: Estimate
    ce_recovered: Estimate
    ce_recovered_mean: Estimate
    kl: Estimate
    kl_mean: Estimate
    kl_zero: Estimate
    kl_recovered: Estimate
    kl_recovered_mean: Estimate
    dead: float
    dense: float
    histogram: tuple[int, ...]
    n_conversations: int
    n_tokens: int
    n_predictions: int


class RoleSums:
    """Sums over tokens by role and conversation, and how often each latent fired by role; for any number of tokens.

    Args:
        means: mean activation of each role, in the order of `POSITIONS`.
        n_conversations: conversations in all.
        d_sae: latents.
    """

    def __init__(self, means: Float[Tensor, "role d_in"], n_conversations: int, d_sae: int) -> None:
        self._means = means
        self._shape = (len(POSITIONS), n_conversations)
        self._sums: dict[str, Float[Tensor, "role conversation"]] = {}
        self._fired = torch.zeros(len(POSITIONS), d_sae, dtype=torch.long)

    def add(
        self,
        sae: SAE,
        acts: Float[Tensor, "token d_in"],
        roles: UInt8[Tensor, " token"],
        rows: Int[Tensor, " token"],
        predicted: Mapping[str, Float[Tensor, " token"]],
    ) -> None:
        """Count some tokens.

        Args:
            sae: the SAE.
            acts: activations.
            roles: `Role` flags.
            rows: conversation of each token.
            predicted: what else is summed over tokens, by name.
        """
        acts = acts.to(sae.W_dec.device)
        latents = sae.encode(acts)
        active = latents.values != 0
        x, recon = acts.double(), sae.decode(latents, acts).double()
        norm, recon_norm = (torch.linalg.vector_norm(vectors, dim=1) for vectors in (x, recon))
        values = {
            "tokens": torch.ones(len(x)),
            "error": (x - recon).square().sum(1),
            "cosine": torch.nn.functional.cosine_similarity(x, recon, dim=1),
            "norm_ratio": recon_norm / norm,
            "l0": active.sum(1),
            **predicted,
        }
        for index, role in enumerate(POSITIONS):
            chosen = select_positions(roles, role)
            here = chosen.to(x.device)
            variance = (x[here] - self._means[index].to(x.device)).square().sum(1)
            own = {name: value[chosen.to(value.device)] for name, value in values.items()} | {"variance": variance}
            for name, value in own.items():
                sums = self._sums.setdefault(name, torch.zeros(self._shape, dtype=torch.double))
                sums[index].index_add_(0, rows[chosen], value.double().cpu())
            fired = latents.indices[here][active[here]]
            self._fired[index] += torch.bincount(fired, minlength=self._fired.shape[1]).cpu()

    def figures(self, n_resamples: int, seed: int) -> Iterator[tuple[Positions, RoleFidelity]]:
        """The roles that occur, each with its figures."""
        for index, role in enumerate(POSITIONS):
            units = self._sums["tokens"][index] > 0
            if not bool(units.any()):
                continue
            sums = {name: values[index, units] for name, values in self._sums.items()}
            ratios = _ratios(sums)
            above, below = (torch.stack(parts, 1) for parts in zip(*ratios.values(), strict=True))
            estimates = estimate_ratios(above, below, n_resamples=n_resamples, seed=seed)
            n_tokens = int(sums["tokens"].sum())
            rates = self._fired[index].double() / n_tokens
            yield (
                role,
                RoleFidelity(
                    **dict(zip(ratios, estimates, strict=True)),
                    dead=float((rates == 0).double().mean()),
                    dense=float((rates > DENSE_RATE).double().mean()),
                    histogram=_histogram(rates[rates > 0]),
                    n_conversations=int(units.sum()),
                    n_tokens=n_tokens,
                    n_predictions=int(sums["predictions"].sum()),
                ),
            )


def _ratios(s: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Every figure as numerator and denominator, conversation by conversation."""
    return {
        "fvu": (s["error"], s["variance"]),
        "explained_variance": (s["variance"] - s["error"], s["variance"]),
        **{name: (s[name], s["tokens"]) for name in ("cosine", "norm_ratio", "l0")},
        **{name: (s[name], s["predictions"]) for name in ("ce_clean", "ce_sae", "ce_mean", "ce_zero")},
        "ce_recovered": (s["ce_zero"] - s["ce_sae"], s["ce_zero"] - s["ce_clean"]),
        "ce_recovered_mean": (s["ce_mean"] - s["ce_sae"], s["ce_mean"] - s["ce_clean"]),
        "kl": (s["kl_sae"], s["tokens"]),
        "kl_mean": (s["kl_mean"], s["tokens"]),
        "kl_zero": (s["kl_zero"], s["tokens"]),
        "kl_recovered": (s["kl_zero"] - s["kl_sae"], s["kl_zero"]),
        "kl_recovered_mean": (s["kl_mean"] - s["kl_sae"], s["kl_mean"]),
    }


def _histogram(rates: Float[Tensor, " latent"]) -> tuple[int, ...]:
    n_bins = len(FREQUENCY_EDGES) - 1
    edges = torch.tensor(FREQUENCY_EDGES, dtype=rates.dtype)
    bins = torch.bucketize(rates.log10(), edges, right=True) - 1
    return tuple(torch.bincount(bins.clamp(0, n_bins - 1), minlength=n_bins).tolist())
