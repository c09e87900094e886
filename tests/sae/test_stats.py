"""Bootstrap intervals cover what they should."""

from __future__ import annotations

import math

import pytest
import torch

from saetools.errors import InputError
from saetools.stats import bootstrap_weights, estimate_mean, estimate_ratios


@pytest.mark.parametrize(("shape", "true_mean"), [("normal", 0.0), ("exponential", 1.0), ("coin", 0.3)])
def test_intervals_cover_the_true_mean_95_times_in_100(shape: str, true_mean: float):
    generator = torch.Generator().manual_seed(4)
    draws = {
        "normal": torch.randn(600, 80, generator=generator),
        "exponential": -torch.rand(600, 80, generator=generator).clamp_min(1e-9).log(),
        "coin": (torch.rand(600, 80, generator=generator) < 0.3).float(),
    }[shape]
    estimates = [estimate_mean(values, n_resamples=400) for values in draws]
    covered = sum(estimate.low <= true_mean <= estimate.high for estimate in estimates) / 600
    assert 0.91 < covered < 0.98  # standard error 0.01; percentile intervals are a little short at n = 80
    ses = torch.tensor([estimate.se for estimate in estimates])
    assert ses.mean() == pytest.approx(float(draws.mean(1).std()), rel=0.1)


def test_an_estimate():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    estimate = estimate_mean(values, seed=3)
    assert (estimate.mean, estimate.n) == (3.0, 4)
    assert estimate.se == pytest.approx(float(values.std()) / 2)
    assert 1 <= estimate.low < 3 < estimate.high <= 6
    assert estimate == estimate_mean(values, seed=3)
    assert str(estimate).startswith("3.000 [")
    assert str(estimate).endswith("(n=4)")


def test_weights_count_draws():
    weights = bootstrap_weights(7, 50, seed=0)
    torch.testing.assert_close(weights.sum(1), torch.ones(50))
    torch.testing.assert_close((weights * 7).round(), weights * 7)
    assert torch.equal(weights, bootstrap_weights(7, 50, seed=0))
    assert not torch.equal(weights, bootstrap_weights(7, 50, seed=1))


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_values(n: int):
    with pytest.raises(InputError, match="values: expected two or more"):
        estimate_mean(torch.ones(n))


def test_ratios_of_sums():
    numerators, denominators = torch.tensor([[1.0, 6.0], [5.0, 6.0], [3.0, 6.0]]), torch.tensor([[2.0, 3.0]] * 3)
    first, second = estimate_ratios(numerators, denominators, seed=3)
    assert first == estimate_mean(numerators[:, 0] / 2, seed=3)
    assert (second.mean, second.low, second.high, second.se, second.n) == (2, 2, 2, 0, 3)
    (lone,) = estimate_ratios(numerators[:1, :1], denominators[:1, :1])
    assert (lone.mean, lone.n, math.isnan(lone.low), math.isnan(lone.se)) == (0.5, 1, True, True)


def test_intervals_of_ratios_cover_95_times_in_100():
    """Sums over units of very different sizes, as conversations have."""
    generator = torch.Generator().manual_seed(5)
    sizes = torch.randint(1, 20, (100, 400), generator=generator).double()
    sums = sizes * (0.3 + 0.1 * torch.randn(100, 400, generator=generator, dtype=torch.double))
    estimates = estimate_ratios(sums, sizes, n_resamples=400)
    covered = sum(estimate.low <= 0.3 <= estimate.high for estimate in estimates) / 400
    assert 0.9 < covered < 0.98
    assert torch.tensor([one.se for one in estimates]).mean() == pytest.approx(
        float(torch.tensor([one.mean for one in estimates]).std()), rel=0.1
    )
