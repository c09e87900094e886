"""Tests and intervals: exact where everything can be counted, calibrated where it cannot."""

import itertools
import math

import pytest
import torch

from saetools.errors import InputError
from saetools.significance import (
    bootstrap_t_intervals,
    draw_p_value,
    false_discovery_rates,
    mean_p_values,
    sign_flip_p_values,
    skewed_t_p_values,
)
from saetools.stats import bootstrap_weights


def exact(values):
    """The share of all sign choices with as large a sum."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(values))), dtype=torch.double)
    sums = (signs @ values.double().abs()).abs()
    return float((sums >= values.double().sum().abs() * (1 - 1e-12)).double().mean())


def p_of(values):
    return float(sign_flip_p_values(values, torch.zeros(len(values), dtype=torch.long), 1))


@pytest.mark.parametrize("spread", ["normal", "heavy"])
def test_the_tail_is_that_of_all_flips(spread):
    generator = torch.Generator().manual_seed(0)
    ratios = []
    while len(ratios) < 40:
        values = torch.randn(14, generator=generator) + 1.0
        if spread == "heavy":
            values = values * torch.rand(14, generator=generator) ** -0.7
        share = exact(values)
        if 0.0005 < share < 0.1:
            ratios.append(p_of(values) / share)
    ratios = torch.tensor(ratios)
    assert 0.9 < ratios.median() < 1.15
    assert (ratios > 0.6).all()
    assert (ratios < 1.7).all()


def test_the_most_extreme_choice_and_the_least():
    values = torch.rand(30, generator=torch.Generator().manual_seed(0)) + 0.1
    assert p_of(values) == pytest.approx(2 / 2**30)
    assert p_of(-values) == pytest.approx(2 / 2**30)
    assert p_of(torch.tensor([1.0, -1.0])) == 1.0
    assert p_of(torch.tensor([1.0, 0.0])) == 1.0  # of one value, either sign is as extreme
    assert sign_flip_p_values(torch.zeros(0), torch.zeros(0, dtype=torch.long), 3).tolist() == [1.0] * 3


def test_scale_sign_order_and_zeros_do_not_matter():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(40, generator=generator) + 0.4
    p = p_of(values)
    for other in (1e-20 * values, 1e20 * values, -values, values.flip(0), torch.cat([values, torch.zeros(9)])):
        assert p_of(other) == pytest.approx(p, rel=1e-5)


def test_it_resolves_far_below_what_flips_can_count():
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(400, generator=generator) + 0.5
    t = values.mean() / values.std() * 400**0.5
    normal = 2 * torch.special.ndtr(-t.double())
    assert p_of(values) < 0.05 / 1e6
    assert p_of(values) == pytest.approx(float(normal), rel=20)  # same order of magnitude at 10 standard errors
    assert p_of(values) > 0


def test_null_p_values_are_uniform():
    generator = torch.Generator().manual_seed(3)
    n_tests, n = 20_000, 30
    values = torch.randn(n_tests, n, generator=generator).pow(3)  # symmetric, heavy tails
    values = values * (torch.rand(n_tests, n, generator=generator) < 0.6)  # inactive in many conversations
    p = sign_flip_p_values(values.flatten(), torch.arange(n_tests).repeat_interleave(n), n_tests)
    for level in (0.001, 0.01, 0.05, 0.5):
        error = (level * (1 - level) / n_tests) ** 0.5
        assert abs(float((p <= level).double().mean()) - level) < 4 * error + 0.06 * level


def together(values, test):
    """p-values of the rows."""
    n_tests, n = values.shape
    return test(values.flatten(), torch.arange(n_tests).repeat_interleave(n), n_tests)


def exponential(n_tests, n, seed):
    """Mean 0, standard deviation 1, skewness 2."""
    return -torch.rand(n_tests, n, generator=torch.Generator().manual_seed(seed), dtype=torch.double).log() - 1


@pytest.mark.parametrize(("n", "active"), [(24, 24), (64, 64), (200, 200), (64, 20)])
def test_null_p_values_of_skewed_changes_are_not_too_small(n, active):
    n_tests = 20_000
    values = exponential(n_tests, n, seed=n + active)
    values[:, active:] = 0
    p, flips = (together(values, test) for test in (mean_p_values, sign_flip_p_values))
    for level in (0.001, 0.01, 0.05):
        error = (level * (1 - level) / n_tests) ** 0.5
        assert float((p <= level).double().mean()) < 1.3 * level + 3 * error
    assert (p <= 0.05).double().mean() > 0.03
    assert (flips <= 0.001).double().mean() > 0.0015  # what would be if skew were ignored
    assert (p >= flips).all()


@pytest.mark.parametrize("power", [1, 3])
def test_null_p_values_of_symmetric_changes_stay_near_their_levels(power):
    values = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(7)).pow(power)
    p, alone = (together(values, test) for test in (mean_p_values, skewed_t_p_values))
    for level in (0.01, 0.05):
        assert 0.75 * level < (p <= level).double().mean() < 1.2 * level
    assert power == 1 or (alone <= 0.01).double().mean() > 0.015  # the t test alone is too sure of heavy tails


def test_p_values_allowing_for_skew_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(8)
    values = torch.randn(6, 12, generator=generator, dtype=torch.double).exp() * torch.linspace(-1, 2, 6)[:, None] + 0.1
    values[:, 9:] = 0
    found = together(values, skewed_t_p_values)
    for row, p in zip(values.tolist(), found.tolist(), strict=True):
        some = [value for value in row if value]
        n = len(some)
        mean = sum(some) / n
        sd = (sum((value - mean) ** 2 for value in some) / (n - 1)) ** 0.5
        skewness = sum((value - mean) ** 3 for value in some) / n / (sd**2 * (n - 1) / n) ** 1.5
        skewness -= math.copysign(0.5 * (6 / n) ** 0.5, mean)
        t = n**0.5 * (((1 + skewness * mean / sd / 3) ** 3 - 1) / skewness + skewness / (6 * n))
        t = abs(t) if t * mean > 0 else 0.0
        grid = torch.linspace(0, t, 20_001, dtype=torch.double)
        density = (1 + grid.square() / (n - 1)) ** (-n / 2)
        scale = math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2)) / (math.pi * (n - 1)) ** 0.5
        assert p == pytest.approx(1 - 2 * scale * float(torch.trapezoid(density, grid)), rel=5e-3, abs=1e-6)
    assert 0 < found.min() < 0.01 < 0.1 < found.max() < 1


def test_skew_weakens_only_changes_that_it_could_feign():
    values = exponential(500, 64, seed=9)
    for shift, least, most in ((0.6, 0.0, 0.05), (-0.6, 0.75, 1.0)):  # exceptions on the side of the mean, and not
        flips, p = (together(values + shift, test) for test in (sign_flip_p_values, mean_p_values))
        assert least <= (p > 10 * flips).double().mean() <= most


def test_changes_of_one_sign_resolve_below_a_bonferroni_level():
    generator = torch.Generator().manual_seed(10)
    for n, least in ((18, 0.0), (20, 0.75), (24, 0.93), (64, 1.0)):
        values = torch.rand(1000, n, generator=generator) + 0.1
        reached = (together(values, mean_p_values) < 0.05 / 8192).double().mean()
        assert least <= reached
        assert n > 18 or reached == 0  # 2 / 2^18 is above
    assert mean_p_values(torch.ones(30), torch.zeros(30, dtype=torch.long), 1).item() == pytest.approx(2 / 2**30)
    assert mean_p_values(-torch.ones(1), torch.zeros(1, dtype=torch.long), 2).tolist() == [1.0, 1.0]


def test_scale_sign_and_zeros_do_not_matter_with_skew():
    values = torch.randn(40, generator=torch.Generator().manual_seed(11), dtype=torch.double).exp() - 0.7
    none = torch.zeros(40, dtype=torch.long)
    p = skewed_t_p_values(values, none, 1).item()
    assert 1e-9 < p < 0.5
    for other in (1e-100 * values, 1e100 * values, -values, values.flip(0)):
        assert skewed_t_p_values(other, none, 1).item() == pytest.approx(p, rel=1e-6)
    padded = torch.cat([values, torch.zeros(9)])
    assert skewed_t_p_values(padded, torch.zeros(49, dtype=torch.long), 1).item() == pytest.approx(p, rel=1e-6)


def test_false_discovery_rates_are_those_of_the_step_up_rule():
    generator = torch.Generator().manual_seed(4)
    p = torch.rand(200, generator=generator).double() ** 3
    q = false_discovery_rates(p)
    ordered = p.sort().values
    for level in (0.01, 0.05, 0.2):
        passed = (ordered <= level * torch.arange(1, 201) / 200).nonzero()
        n_rejected = int(passed[-1]) + 1 if len(passed) else 0
        assert int((q <= level).sum()) == n_rejected
    assert torch.equal(torch.argsort(q[torch.argsort(p)], stable=True), torch.arange(200))
    assert len(false_discovery_rates(torch.zeros(0))) == 0


@pytest.mark.parametrize(("spread", "least"), [("normal", 0.94), ("skewed", 0.93), ("sparse", 0.93)])
def test_intervals_cover_the_truth(spread, least):
    n, n_measures = 60, 3000
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(n_measures, n, generator=generator)
    mean = 0.3
    values = {"normal": mean + noise, "skewed": mean + noise + (noise**2 - 1), "sparse": mean + noise}[spread]
    if spread == "sparse":
        values = values * (torch.rand(n_measures, n, generator=generator) < 0.5) * 2
    measures = torch.arange(n_measures).repeat_interleave(n)
    units = torch.arange(n).repeat(n_measures)
    weights = bootstrap_weights(n, 1000, seed=0)
    low, high = bootstrap_t_intervals(values.flatten(), measures, units, n_measures, weights)
    assert least < float(((low <= mean) & (mean <= high)).double().mean()) < 0.975
    assert bool((low <= values.mean(1) + 1e-6).all())


def test_intervals_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(6)
    values = torch.randn(40, generator=generator).exp()
    weights = bootstrap_weights(40, 500, seed=0)
    low, high = bootstrap_t_intervals(values, torch.zeros(40, dtype=torch.long), torch.arange(40), 1, weights)[:, 0]
    t = []
    for row in (40 * weights).round().long():
        drawn = values.repeat_interleave(row)
        t.append(float((drawn.mean() - values.mean()).abs() / (drawn.std() / 40**0.5)))
    reach = float(torch.tensor(t).quantile(0.95)) * float(values.std() / 40**0.5)
    assert float(low) == pytest.approx(float(values.mean()) - reach, rel=1e-3)
    assert float(high) == pytest.approx(float(values.mean()) + reach, rel=1e-3)


def test_measures_without_values_have_no_width():
    weights = bootstrap_weights(5, 100, seed=0)
    ends = bootstrap_t_intervals(torch.ones(5), torch.full((5,), 3), torch.arange(5), 2000, weights)
    assert ends[:, 3].tolist() == pytest.approx([1.0, 1.0])
    assert not ends[:, 4:].any()


def test_resamples_without_spread_widen_an_interval():
    """Four of 30 units: a resample that draws none of them has no spread."""
    values = torch.zeros(30)
    values[:4] = torch.tensor([0.5, 1.0, 1.2, 2.0])
    weights = bootstrap_weights(30, 2000, seed=1)
    low, high = bootstrap_t_intervals(values[:4], torch.zeros(4, dtype=torch.long), torch.arange(4), 1, weights)[:, 0]
    t = []
    for row in (30 * weights).round().long():
        drawn = values.repeat_interleave(row)
        error = float(drawn.std() / 30**0.5)
        t.append(float((drawn.mean() - values.mean()).abs()) / error if error else math.inf)
    ordered, without = sorted(t), sum(map(math.isinf, t))
    assert 0 < without < 100
    reach = ordered[1899] * float(values.std() / 30**0.5)
    assert float(values.mean()) - float(low) == pytest.approx(reach, rel=0.02)
    assert float(high) - float(values.mean()) == pytest.approx(reach, rel=0.02)
    assert reach > 1.2 * ordered[1899 - without] * float(values.std() / 30**0.5)  # what counting them as 0 would give


@pytest.mark.parametrize("n_active", [3, 5, 8])
def test_intervals_of_few_active_units_cover_the_truth_or_are_none(n_active):
    n, n_measures = 64, 2000
    generator = torch.Generator().manual_seed(12)
    active = torch.rand(n_measures, n, generator=generator) < n_active / n
    values = (torch.randn(n_measures, n, generator=generator) + 1) * active
    measures = torch.arange(n_measures).repeat_interleave(n)
    weights = bootstrap_weights(n, 1000, seed=0)
    low, high = bootstrap_t_intervals(
        values.flatten(), measures, torch.arange(n).repeat(n_measures), n_measures, weights
    )
    known = ~low.isnan()
    assert torch.equal(known, ~high.isnan())
    assert known[active.sum(1) == 0].all()
    assert not known[(active.sum(1) > 0) & (active.sum(1) < 3)].any()
    assert known[active.sum(1) >= 6].double().mean() > 0.95
    counted = known & active.any(1)
    truth = n_active / n
    assert ((low <= truth) & (truth <= high))[counted].double().mean() > 0.94


def test_fewer_than_four_units_have_no_interval():
    for n in (2, 3):
        values, weights = torch.arange(n) + 1.0, bootstrap_weights(n, 500, seed=0)
        measures, units = torch.zeros(n, dtype=torch.long), torch.arange(n)
        assert bootstrap_t_intervals(values, measures, units, 1, weights).isnan().all()


@pytest.mark.parametrize(("spread", "most"), [(0.0, 0.02), (0.3, 0.07), (2.0, 0.07)])
def test_one_more_draw_of_the_controls_seldom_counts_as_more(spread, most):
    generator = torch.Generator().manual_seed(0)
    draws = torch.arange(96) % 24
    p_values = []
    for number in range(300):
        effects = spread * torch.randn(25, generator=generator)
        differences = effects[24] - effects[draws] + torch.randn(96, generator=generator)
        p_values.append(draw_p_value(differences, draws, seed=number))
    assert 0 < sum(p <= 0.05 for p in p_values) / 300 <= most or spread == 0


def test_what_goes_beyond_all_draws_counts_and_what_is_only_above_their_mean_does_not():
    generator = torch.Generator().manual_seed(1)
    draws = torch.arange(96) % 24
    effects = torch.randn(24, generator=generator)
    noise = 0.1 * torch.randn(96, generator=generator)
    assert draw_p_value(5.0 - effects[draws] + noise, draws) < 1e-3
    above = 0.5 - effects[draws] + noise
    assert mean_p_values(above, torch.zeros(96, dtype=torch.long), 1)[0] < 1e-3  # it is no average one
    assert draw_p_value(above, draws) > 0.2
    assert draw_p_value(-5.0 - effects[draws] + noise, draws) > 0.99


def test_controls_have_to_serve_several_units():
    with pytest.raises(InputError, match="received 8 controls of 8 units"):
        draw_p_value(torch.ones(8), torch.arange(8))
    with pytest.raises(InputError, match="received 1 controls"):
        draw_p_value(torch.ones(8), torch.zeros(8, dtype=torch.long))
