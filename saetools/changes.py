"""Figures of mean changes over independent units: size, interval, error, p-value, false discovery rate."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saetools.significance import bootstrap_t_intervals, false_discovery_rates, sign_flip_p_values
from saetools.stats import Estimate, bootstrap_weights

FDR = 0.05
"""The false discovery rate at which a latent counts as changed."""
_CHUNK = 2048  # measures whose values are dense at the same time


def change_figures(
    values: Float[Tensor, " value"],
    measures: Int[Tensor, " value"],
    units: Int[Tensor, " value"],
    tested: Bool[Tensor, " measure"],
    *,
    n_units: int,
    n_resamples: int,
    seed: int,
) -> dict[str, Float[Tensor, " measure"]]:
    """Mean changes of many measures (latents) over units (conversations), in float64.

    Args:
        values: paired changes in units; zeros may be left out.
        measures: the measure of each, ascending.
        units: the unit of each.
        tested: which measures get p-values; the others' are NaN, and do not count for the false discovery rate.
        n_units: units in all.
        n_resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        `delta`, the mean; its 95 % bootstrap-t interval `low`, `high`; standard error `se`; `effect` = delta / sd over
        units (0 if the sd is); `p_value` by sign flips; `q_value`.
    """
    n_measures, values = len(tested), values.double()

    def mean(parts: Tensor) -> Tensor:
        return parts.new_zeros(n_measures).index_add_(0, measures, parts) / n_units

    delta = mean(values)
    sd = ((mean(values.square()) - delta.square()).clamp_min(0) * (n_units / (n_units - 1))).sqrt()
    weights = bootstrap_weights(n_units, n_resamples, seed=seed)
    low, high = bootstrap_t_intervals(values, measures, units, n_measures, weights)
    p_values = torch.where(tested, sign_flip_p_values(values, measures, n_measures), math.nan)
    q_values = p_values.clone()
    q_values[tested] = false_discovery_rates(p_values[tested])
    return {
        "delta": delta,
        "low": low,
        "high": high,
        "se": sd / n_units**0.5,
        "effect": torch.where(sd > 0, delta / sd, 0.0),
        "p_value": p_values,
        "q_value": q_values,
    }


def projection_share(
    part: Float[Tensor, " value"],
    whole: Float[Tensor, " value"],
    measures: Int[Tensor, " value"],
    units: Int[Tensor, " value"],
    *,
    n_measures: int,
    n_units: int,
    n_resamples: int,
    seed: int,
) -> Estimate:
    """How much of a mean change of all measures is one part of it: <mean part, mean whole> / <mean whole, mean whole>.

    Both are counted from products of different units only, so that noise, which would lengthen the whole, averages out.

    Args:
        part: of each value; zeros of both may be left out.
        whole: of each value.
        measures: the measure of each.
        units: the unit of each.
        n_measures: measures in all.
        n_units: units in all; memory grows with their square.
        n_resamples: bootstrap resamples of units, for a percentile interval.
        seed: of the bootstrap.

    Returns:
        The share, NaN if the whole is no longer than noise; its interval is NaN if that is so in any resample.
    """
    products = torch.zeros(2, n_units, n_units, dtype=torch.double)
    for start in range(0, n_measures, _CHUNK):
        some = (measures >= start) & (measures < start + _CHUNK)
        dense = torch.zeros(2, n_units, min(_CHUNK, n_measures - start), dtype=torch.double)
        for own, values in zip(dense, (part, whole), strict=True):
            own.index_put_((units[some], measures[some] - start), values[some].double())
        products += dense @ dense[1].T
    products.diagonal(dim1=1, dim2=2).zero_()
    sums = products.sum((1, 2))
    weights = bootstrap_weights(n_units, n_resamples, seed=seed).double()
    resampled = (weights @ products * weights).sum(2)
    mean = float(sums[0] / sums[1]) if sums[1] > 0 else math.nan
    if not sums[1] > 0 or not bool((resampled[1] > 0).all()):
        return Estimate(mean, math.nan, math.nan, math.nan, n_units)
    ratios = resampled[0] / resampled[1]
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return Estimate(mean, low, high, float(ratios.std()), n_units)


def ranks(values: Float[Tensor, " latent"]) -> Int[Tensor, " latent"]:
    """1 for the largest value, and so on; equal ones in their order."""
    out = torch.empty(len(values), dtype=torch.long)
    out[torch.argsort(-values, stable=True)] = torch.arange(1, len(values) + 1)
    return out
