"""Shares of a change: without bias from noise, and with intervals that hold the truth."""

import math

import pytest
import torch

from saetools.changes import projection_share, ranks


def share(part, whole, **settings):
    n, d = part.shape
    units, measures = torch.arange(n).repeat_interleave(d), torch.arange(d).repeat(n)
    settings = {"n_measures": d, "n_units": n, "n_resamples": 200, "seed": 0, **settings}
    return projection_share(part.flatten(), whole.flatten(), measures, units, **settings)


def drawn(seed, noise):
    """A part of 0.3 and a rest of 0.1 on each of 200 measures; the share is 0.75."""
    generator = torch.Generator().manual_seed(seed)
    part = 0.3 + noise * torch.randn(24, 200, generator=generator)
    rest = 0.1 + 2 * noise * torch.randn(24, 200, generator=generator)
    return part, part + rest


def test_noise_neither_biases_the_share_nor_escapes_the_interval():
    found = [share(*drawn(seed, 0.5)) for seed in range(150)]
    mean = sum(one.mean for one in found) / 150
    plugged = [
        part.mean(0) @ whole.mean(0) / whole.mean(0).square().sum()
        for part, whole in (drawn(s, 0.5) for s in range(150))
    ]
    assert abs(mean - 0.75) < 0.02
    assert abs(float(sum(plugged)) / 150 - 0.75) > 0.05  # what products of a unit with itself would do
    held = sum(one.low <= 0.75 <= one.high for one in found) / 150
    assert 0.88 < held < 0.99


def test_a_share_without_noise_is_exact():
    part, whole = drawn(0, 0.0)
    found = share(part, whole)
    assert (found.mean, found.low, found.high) == pytest.approx((0.75, 0.75, 0.75))
    assert share(-part, whole).mean == pytest.approx(-0.75)


def test_no_more_change_than_noise_has_no_share():
    noise = [torch.randn(24, 200, generator=torch.Generator().manual_seed(seed)) for seed in range(10)]
    found = [share(one, one) for one in noise]
    assert 0 < sum(math.isnan(one.mean) for one in found) < 10
    assert all(math.isnan(one.low) and math.isnan(one.high) for one in found)


def test_measures_in_several_parts_are_those_of_all_together(monkeypatch):
    together = share(*drawn(1, 0.5))
    monkeypatch.setattr("saetools.changes._CHUNK", 7)
    assert share(*drawn(1, 0.5)).mean == pytest.approx(together.mean)


def test_ranks_of_equal_values_keep_their_order():
    assert ranks(torch.tensor([1.0, 5.0, 1.0, -2.0])).tolist() == [2, 1, 3, 4]
