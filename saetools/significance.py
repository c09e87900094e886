"""How unlikely a mean change is by chance: sign flips, a t test that allows for skew, false discovery rate, intervals.

All are for many measures at once (latents) on few independent units (conversations), of which each measure concerns
only some: values are given as (unit, measure, value) triples, and zeros are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.errors import InputError

_NEWTON_STEPS = 100
_TINY = 1e-12
_CHUNK = 1024  # measures whose resampled means exist at the same time
_CAUTION = 0.5  # standard errors of skewness by which `skewed_t_p_values` mistrusts a sample
_LARGEST_T = 100.0  # times sqrt(units - 1): float32 hardly tells the spread of a resample beyond it from none
_INFINITY = 1e30  # quantiles between it and a number are numbers
_DRAWS = 4096  # of variances
_LARGEST_EFFECT = 1e6  # mean over standard deviation; so that its cube stays in range


def mean_p_values(
    values: Float[Tensor, " value"], measures: Int[Tensor, " value"], n_measures: int
) -> Float[Tensor, " measure"]:
    """Two-sided p-values that means of paired differences are 0: larger of `sign_flip_p_values`, `skewed_t_p_values`.

    Sign flips are exact for symmetric differences, however heavy their tails, and too sure of skewed ones; the t test
    allows for skew, and alone is too sure of heavy tails. How often null p-values are at most 0.05, 0.01, 0.001 and
    1e-5, over these levels, with flips alone in brackets (400,000 nulls each; `tests/test_significance.py` holds some):

    - normal, 24 differences: 0.8, 0.7, 0.6, 0.8 (1.0, 1.0, 1.0, 1.0);
    - cubes of normal, 64: 1.0, 1.0, 1.0, 0.8 (1.0, 1.0, 1.0, 1.0);
    - exponential (skewness 2), 24: 0.8, 0.8, 1.2, 4 (1.6, 3.0, 8.7, 52); 64: 0.8, 0.7, 0.7, 1.5 (1.3, 2.0, 5.3, 42);
    - lognormal (skewness 6), 24: 1.1, 1.7, 3.6, 25 (2.5, 6.5, 26, 290); 64: 1.0, 1.4, 2.5, 11 (2.0, 4.7, 19, 310).

    Of sets of 8,192 exponential nulls, 64 differences each, 10 % have a false discovery rate up to 0.05 anywhere,
    where 5 % should (flips alone: 97 %). No test holds for a mean of 0 made by exceptions so rare that most samples
    have none.

    No p-value is below 2 / 2^m for m differences that are not 0: it takes 19 to pass 0.05 / 8192, and some more if
    their sizes differ much. The price of the second test is power for means whose few large exceptions have the other
    sign: small samples cannot tell them from a skewed null.

    Args:
        values: paired differences of independent units that are not 0; zeros change nothing.
        measures: the measure of each.
        n_measures: measures in all; one without values has p = 1.

    Returns:
        p-values in float64.
    """
    flips = sign_flip_p_values(values, measures, n_measures)
    return torch.maximum(flips, skewed_t_p_values(values, measures, n_measures))


def draw_p_value(differences: Float[Tensor, " unit"], draws: Int[Tensor, " unit"], *, seed: int = 0) -> float:
    """One-sided p-value that a treatment is one more draw from the population of its random controls.

    That its mean exceeds the mean of the controls shows only that it is no average one: with enough units, every draw
    above the average does. Here every unit has one of several controls, and the controls differ: of the differences,
    variance between the groups that share a control tells by how much. The null is that the treatment's own effect
    deviates from the controls' mean as one of them does. Weerahandi's generalised p-value (1995, Exact Statistical
    Methods for Data Analysis) for the one-way layout with random effects: the variances are drawn from what the mean
    squares say of them, and a mean this large has a normal tail given each.

    Args:
        differences: treatment minus control, unit by unit, positive where the treatment goes further.
        draws: which control each unit has; at least two of them, and at least one for two units or more.
        seed: of the draws of variances.

    Raises:
        InputError: if the controls cannot be told from the units.
    """
    d = differences.double()
    groups = torch.unique(draws, return_inverse=True)[1]
    n, sizes = len(d), groups.bincount().double()
    n_groups = len(sizes)
    if not 2 <= n_groups < n:
        raise InputError(
            "draws",
            expected="two controls or more, and more units than controls",
            received=f"{n_groups} controls of {n} units",
            remedy="use fewer controls",
        )
    means = torch.zeros(n_groups, dtype=torch.double).index_add_(0, groups, d) / sizes
    within = (d - means[groups]).square().sum()
    between = (sizes * (means - d.mean()).square()).sum()
    generator = torch.Generator().manual_seed(seed)

    def chi_squared(freedom: int) -> Tensor:
        return torch.randn(_DRAWS, freedom, generator=generator, dtype=torch.double).square().sum(1)

    noise = within / chi_squared(n - n_groups)
    usual = (n - sizes.square().sum() / n) / (n_groups - 1)  # units of a control, where their numbers differ
    spread = ((between / chi_squared(n_groups - 1) - noise) / usual).clamp_min(0)
    variance = spread * (1 + (sizes / n).square().sum()) + noise / n
    return float(torch.special.ndtr(-d.mean() / variance.clamp_min(_TINY**2).sqrt()).mean())


def skewed_t_p_values(
    values: Float[Tensor, " value"], measures: Int[Tensor, " value"], n_measures: int
) -> Float[Tensor, " measure"]:
    """Two-sided p-values of Student's t made symmetric by Hall's transformation (1992), one for each measure.

    The t of a skewed sample is skewed the other way, and a cubic polynomial of it whose coefficients depend on the
    skewness is not. A sample that misses the long tail of its distribution shows both a large t and too little skew, so
    the sample's skewness is first moved by half its standard error against the mean: that half was chosen on means of
    24 exponential draws. The tail of t is Hill's (1970).

    Args:
        values: paired differences of independent units that are not 0; zeros change nothing.
        measures: the measure of each.
        n_measures: measures in all; one without values has p = 1, one whose values are all equal has p = 0.

    Returns:
        p-values in float64.
    """
    d, total = _in_measures(values, measures, n_measures)
    counted = (d != 0).double()
    n = total(counted)
    mean = total(d) / n.clamp_min(1)
    centred = (d - mean[measures]) * counted
    squares = total(centred.square())
    squares = torch.where(squares > _TINY**2 * n, squares, 0.0)  # what rounding leaves of equal values is no spread
    effect = mean / (squares / (n - 1).clamp_min(1)).sqrt().clamp_min(1e-300)
    effect = effect.clamp(-_LARGEST_EFFECT, _LARGEST_EFFECT)
    skewness = torch.where(
        squares > 0, total(centred**3) / n.clamp_min(1) / (squares / n).clamp_min(1e-300) ** 1.5, 0.0
    )
    skewness = skewness - _CAUTION * (6 / n.clamp_min(1)).sqrt() * effect.sign()
    cubic = effect + skewness * effect.square() / 3 + skewness.square() * effect**3 / 27
    t = n.sqrt() * (cubic + skewness / (6 * n.clamp_min(1)))
    t = torch.where(t * effect > 0, t, 0.0).abs()  # never on the other side
    return torch.where((n > 0) & (squares == 0), 0.0, _t_tails(t, (n - 1).clamp_min(1)))


def _in_measures(values: Tensor, measures: Tensor, n_measures: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Values over the largest of their measure, so that powers stay in range, and the sum over each measure."""
    values = values.double()
    largest = values.new_zeros(n_measures).scatter_reduce(0, measures, values.abs(), "amax")

    def total(parts: Tensor) -> Tensor:
        return parts.new_zeros(n_measures).index_add_(0, measures, parts)

    return values / largest.clamp_min(1e-300)[measures], total


def _t_tails(t: Tensor, freedom: Tensor) -> Tensor:
    """Share of Student's t beyond +-t, to a few per mille from 5 degrees of freedom on, however far out."""
    a = freedom - 0.5
    b = 48 * a.square()
    y = a * torch.log1p(t.square() / freedom)
    correction = ((-0.4 * y - 3.3) * y - 24) * y - 85.5
    z = ((correction / (0.8 * y.square() + 100 + b) + y + 3) / b + 1) * y.sqrt()
    tails: Tensor = 2 * torch.special.log_ndtr(-z).exp()  # ndtr itself is 0 beyond 8
    return tails


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
    signed, total = _in_measures(values, measures, n_measures)
    d = signed.abs()
    n = total((d > 0).double())
    reach = total(d)
    observed = total(signed).abs()
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

    t* = (mean* - mean) / error* over resamples (Hall 1988), infinite where a resample has no spread. Percentile and BCa
    intervals were too narrow for latents that are active in few conversations (`saetools.planted` measures it).

    Args:
        values: of units; zeros may be left out.
        measures: the measure of each value, in ascending order.
        units: the unit of each.
        n_measures: measures in all; one without values has the interval [0, 0].
        weights: how often each unit is drawn in each resample, over the number of units (`stats.bootstrap_weights`).
        level: of the interval.

    Returns:
        Lower and upper ends, in float64: NaN where so many resamples have no spread that the interval has no end, as
        with two values that are not 0, or fewer than four units. Memory is 1024 measures x resamples.
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
        moved = (dense - mean) @ weights.T
        squares = (dense - mean).square() @ weights.T
        variance = (squares - moved.square()).clamp_min(0) / (n - 1)
        longest = _LARGEST_T * (n - 1) ** 0.5
        t = (moved.abs() / variance.sqrt()).nan_to_num(0.0)
        t = torch.where(t > longest, _INFINITY, t)
        quantile = torch.quantile(t, level, dim=1, keepdim=True)
        reach = (largest * error * torch.where(quantile > longest, math.nan, quantile)).double()
        centre = (largest * mean).double()
        ends[:, first : first + size] = torch.cat([centre - reach, centre + reach], 1).T
    return ends
