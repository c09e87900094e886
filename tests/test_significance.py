"""Tests and intervals: exact where everything can be counted, calibrated where it cannot."""

import itertools

import pytest
import torch

from saetools.significance import bootstrap_t_intervals, false_discovery_rates, sign_flip_p_values
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
