"""Mean changes over independent units: size, interval and error; p-values and false discovery rates; shares."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saetools.significance import bootstrap_t_intervals, false_discovery_rates, mean_p_values
from saetools.stats import Estimate, bootstrap_weights

FDR = 0.05
"""The false discovery rate at which a latent counts as changed."""
ROUNDING = 1e-4
"""Changes of a latent up to this share of its largest mean activation count as none in tests.

Tests find a change however small, and rounding is not always chance: it may push a latent the same way on all
texts. Measured in float32 on SmolLM2-135M and its SAE, 40 conversations: an adapter against the same adapter merged
into the weights differs by up to 2.3e-5, and 60 of 484 latents would count as changed at their prompts; one batch
against another differs by up to 4e-6, and none would. In bfloat16 batches differ by up to half of it, as other latents
are among the top k: only chance that falls either way, which tests see through, keeps these from counting.
"""
_CHUNK = 2048  # measures whose values are dense at the same time


def change_figures(
    values: Float[Tensor, " value"],
    measures: Int[Tensor, " value"],
    units: Int[Tensor, " value"],
    *,
    n_measures: int,
    n_units: int,
    n_resamples: int,
    seed: int,
) -> dict[str, Float[Tensor, " measure"]]:
    """Mean changes of many measures (latents) over units (conversations), in float64.

    Args:
        values: paired changes in units; zeros may be left out.
        measures: the measure of each, ascending.
        units: the unit of each.
        n_measures: measures in all.
        n_units: units in all.
        n_resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        `delta`, the mean; its 95 % bootstrap-t interval `low`, `high`, NaN where too few units changed for one;
        standard error `se`; `effect` = delta / sd over units (0 if the sd is).
    """
    values = values.double()

    def mean(parts: Tensor) -> Tensor:
        return parts.new_zeros(n_measures).index_add_(0, measures, parts) / n_units

    delta = mean(values)
    sd = ((mean(values.square()) - delta.square()).clamp_min(0) * (n_units / (n_units - 1))).sqrt()
    weights = bootstrap_weights(n_units, n_resamples, seed=seed)
    low, high = bootstrap_t_intervals(values, measures, units, n_measures, weights)
    effect = torch.where(sd > 0, delta / sd, 0.0)
    return {"delta": delta, "low": low, "high": high, "se": sd / n_units**0.5, "effect": effect}


def change_p_values(
    values: Float[Tensor, " value"], sizes: Float[Tensor, " value"], measures: Int[Tensor, " value"], n_measures: int
) -> Float[Tensor, " measure"]:
    """Two-sided p-values of mean changes (`significance.mean_p_values`); those as small as `ROUNDING` count as none.

    Args:
        values: paired changes in units; zeros may be left out.
        sizes: of each, the largest of the activations that it is the difference of.
        measures: the measure of each.
        n_measures: measures in all; one without values has p = 1.
    """
    largest = sizes.new_zeros(n_measures).scatter_reduce(0, measures, sizes, "amax")
    changed = values.abs() > ROUNDING * largest[measures]
    return mean_p_values(values[changed], measures[changed], n_measures)


def change_tests(
    values: Float[Tensor, " value"],
    sizes: Float[Tensor, " value"],
    measures: Int[Tensor, " value"],
    tested: Bool[Tensor, " measure"],
) -> dict[str, Float[Tensor, " measure"]]:
    """`p_value` of each measure as `change_p_values` gives it, and `q_value`, its false discovery rate.

    Args:
        values: paired changes in units; zeros may be left out.
        sizes: of each, the largest of the activations that it is the difference of.
        measures: the measure of each.
        tested: which measures are; the others' values are NaN, and do not count for the false discovery rate.
    """
    p_values = torch.where(tested, change_p_values(values, sizes, measures, len(tested)), math.nan)
    q_values = p_values.masked_scatter(tested, false_discovery_rates(p_values[tested]))
    return {"p_value": p_values, "q_value": q_values}


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
