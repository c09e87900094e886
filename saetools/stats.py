"""Intervals and errors for means over independent units (conversations, items)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.errors import InputError


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval and standard error.

    Args:
        mean: over the units.
        low: lower end of the percentile bootstrap interval.
        high: upper end.
        se: standard error of the mean, sd / sqrt(n).
        n: number of units.
    """

    mean: float
    low: float
    high: float
    se: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


def bootstrap_weights(n: int, n_resamples: int, *, seed: int) -> Float[Tensor, "resample n"]:
    """How often each of n units is drawn in each bootstrap resample, divided by n."""
    generator = torch.Generator().manual_seed(seed)
    drawn: Int[Tensor, "resample n"] = torch.randint(n, (n_resamples, n), generator=generator)
    counts = torch.zeros(n_resamples, n).scatter_add_(1, drawn, torch.ones(1, 1).expand(n_resamples, n))
    return counts / n


def estimate_mean(values: Float[Tensor, " n"], *, n_resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean of independent units with a percentile bootstrap interval.

    Paired differences are such units: pass their difference.

    Raises:
        InputError: for fewer than two values.
    """
    if len(values) < 2:
        raise InputError("values", expected="two or more", received=len(values), remedy="measure more units")
    values = values.double()
    means = bootstrap_weights(len(values), n_resamples, seed=seed).double() @ values
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    se = float(values.std()) / len(values) ** 0.5
    return Estimate(float(values.mean()), low, high, se, len(values))
