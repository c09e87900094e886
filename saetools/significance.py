"""How unlikely a mean change is by chance: sign-flip tests with an exact tail, false discovery rate, intervals.

All are for many measures at once (latents) on few independent units (conversations), of which each measure concerns
only some: values are given as (unit, measure, value) triples, and zeros are left out.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_NEWTON_STEPS = 100
_TINY = 1e-12
_CHUNK = 1024  # measures whose resampled means exist at the same time


def sign_flip_p_values(
    values: Float[Tensor, " value"], measures: Int[Tensor, " value"], n_measures: int
) -> Float[Tensor, " measure"]:
    """Two-sided p-values of the test that flips the signs of paired differences, one for each measure.

    Under the null hypothesis that base and tuned are exchangeable within a conversation, every choice of signs is as
    likely, and p is the share of choices whose sum is as large as the one observed. The share is not counted over
    random flips, which would not resolve p-values below 1 / flips, but computed by the saddlepoint approximation of the
    flip distribution (Robinson 1982; modified root of Barndorff-Nielsen), whose relative error stays small far out in
    the tail. No p-value is below 2 / 2^m, the share of the most extreme choice among those of m values.

    Args:
        values: paired differences that are not 0; zeros change nothing.
        measures: the measure of each.
        n_measures: measures in all; one without values has p = 1.

    Returns:
        p-values in float64.
    """
    values = values.double()

    def total(parts: Tensor) -> Tensor:
        return parts.new_zeros(n_measures).index_add_(0, measures, parts)

    largest = values.new_zeros(n_measures).scatter_reduce(0, measures, values.abs(), "amax")
    d = values.abs() / largest.clamp_min(1e-300)[measures]
    n = total((d > 0).double())
    reach = total(d)
    observed = total(torch.where(values < 0, -d, d)).abs()
    extreme = observed >= reach * (1 - _TINY)  # all of one sign
    t = torch.zeros_like(observed)
    for _ in range(_NEWTON_STEPS):  # K' is concave in t > 0: Newton's steps from 0 rise towards the root
        slope = torch.tanh(t[measures] * d)
        step = (observed - total(d * slope)) / total(d.square() * (1 - slope.square())).clamp_min(1e-300)
        step = torch.where(extreme, 0.0, step)
        t = t + step
        if bool((step.abs() <= 1e-10 * (1 + t)).all()):
            break
    scaled = t[measures] * d
    k = total(scaled + torch.log1p(torch.exp(-2 * scaled)) - math.log(2))
    root = (2 * (t * observed - k)).clamp_min(0).sqrt()
    wald = t * total(d.square() * (1 - torch.tanh(scaled).square())).sqrt()
    near = root < 1e-3  # at the centre both vanish, and the normal approximation is exact
    modified = torch.where(near, root, root + torch.log(wald.clamp_min(1e-300) / root.clamp_min(1e-300)) / root)
    log_p = math.log(2) + torch.special.log_ndtr(-modified)
    least = (1 - n) * math.log(2)
    log_p = torch.where(extreme, least, torch.maximum(log_p, least)).clamp_max(0)
    return torch.where(n > 0, log_p.exp(), 1.0)


def false_discovery_rates(p_values: Float[Tensor, " test"]) -> Float[Tensor, " test"]:
    """The smallest false discovery rate at which each test is rejected (Benjamini and Hochberg 1995).

    Args:
        p_values: of the tests that were made; leave out those that were not.
    """
    n = len(p_values)
    order = torch.argsort(p_values)
    ranked = p_values[order].double() * n / torch.arange(1, n + 1, dtype=torch.double)
    lowest = torch.cummin(ranked.flip(0), 0).values.flip(0) if n else ranked
    return torch.empty_like(lowest).index_copy_(0, order, lowest.clamp_max(1.0))


def bootstrap_t_intervals(
    values: Float[Tensor, " value"],
    measures: Int[Tensor, " value"],
    units: Int[Tensor, " value"],
    n_measures: int,
    weights: Float[Tensor, "resample unit"],
    *,
    level: float = 0.95,
) -> Float[Tensor, "2 measure"]:
    """Symmetric bootstrap-t intervals of means over units: mean +- a quantile of |t*| times the standard error.

    t* = (mean* - mean) / error* over resamples (Hall 1988). Percentile and BCa intervals were too narrow for latents
    that are active in few conversations (`saetools.planted` measures it).

    Args:
        values: of units; zeros may be left out.
        measures: the measure of each value, in ascending order.
        units: the unit of each.
        n_measures: measures in all; one without values has the interval [0, 0].
        weights: how often each unit is drawn in each resample, over the number of units (`stats.bootstrap_weights`).
        level: of the interval.

    Returns:
        Lower and upper ends, in float64. Memory is 1024 measures x resamples.
    """
    n = weights.shape[1]
    ends = torch.zeros(2, n_measures, dtype=torch.double)
    starts = torch.searchsorted(measures, torch.arange(0, n_measures + _CHUNK, _CHUNK))
    for number, first in enumerate(range(0, n_measures, _CHUNK)):
        some = slice(int(starts[number]), int(starts[number + 1]))
        size = min(_CHUNK, n_measures - first)
        dense = torch.zeros(size, n).index_put_((measures[some] - first, units[some]), values[some].float())
        largest = dense.abs().amax(1, keepdim=True).clamp_min(1e-30)
        dense /= largest  # so that squares stay in range
        mean = dense.mean(1, keepdim=True)
        error = dense.std(1, keepdim=True) / n**0.5
        resampled = dense @ weights.T
        squares = dense.square() @ weights.T
        errors = ((squares - resampled.square()).clamp_min(0) / (n - 1)).sqrt()
        t = torch.where(errors > 1e-6, (resampled - mean).abs() / errors, 0.0)
        reach = (largest * error * torch.quantile(t, level, dim=1, keepdim=True)).double()
        centre = (largest * mean).double()
        ends[:, first : first + size] = torch.cat([centre - reach, centre + reach], 1).T
    return ends
