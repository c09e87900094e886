"""Intervals and errors for means and ratios over independent units (conversations, items)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.errors import InputError


@dataclass(frozen=True)
class Estimate:
    """A mean, a ratio of sums or a share, with its 95 % interval and standard error.

    What makes it says by which method: the functions here take the percentile bootstrap, while scores of explanations
    (`saetools.interpret`) have an interval under Jeffreys' prior.

    Args:
        mean: over the units.
        low: lower end of the interval.
        high: upper end.
        se: standard error, for a mean sd / sqrt(n).
        n: number of units.
    """

    mean: float
    low: float
    high: float
    se: float
    n: int

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Estimate:
        """From its fields, null where a number was not finite."""
        ends = [math.nan if value[name] is None else float(value[name]) for name in ("mean", "low", "high", "se")]
        mean, low, high, se = ends
        return cls(mean, low, high, se, value["n"])

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
    return estimate_ratios(values[:, None], torch.ones(len(values), 1), n_resamples=n_resamples, seed=seed)[0]


def estimate_ratios(
    numerators: Float[Tensor, "n measure"],
    denominators: Float[Tensor, "n measure"],
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> list[Estimate]:
    """Ratios of sums over independent units, such as error over variance, with percentile bootstrap intervals.

    All measures are resampled together. Standard errors are those of the linearised ratio. From a single unit there is
    no telling: interval and standard error are NaN, as is a ratio of 0 to 0.

    Args:
        numerators: of each unit.
        denominators: of each unit; a ratio of means over tokens has the number of tokens here.
        n_resamples: bootstrap resamples.
        seed: of the bootstrap.
    """
    n, above, below = len(numerators), numerators.double(), denominators.double()
    ratios = above.sum(0) / below.sum(0)
    if n < 2:
        return [Estimate(ratio, math.nan, math.nan, math.nan, n) for ratio in ratios.tolist()]
    weights = bootstrap_weights(n, n_resamples, seed=seed).double()
    ends = torch.tensor([0.025, 0.975], dtype=torch.double)
    low, high = torch.quantile((weights @ above) / (weights @ below), ends, dim=0)
    se = ((above - ratios * below) / below.mean(0)).std(0) / n**0.5
    columns = torch.stack([ratios, low, high, se], dim=1).tolist()
    return [Estimate(mean, start, end, error, n) for mean, start, end, error in columns]
