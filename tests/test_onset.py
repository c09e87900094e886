"""Onsets: planted ones are found, by steps and ramps, and their intervals hold them."""

import pytest
import torch

from saetools.onset import find_onsets, onset_intervals
from saetools.stats import bootstrap_weights

X = torch.tensor([10.0, 20.0, 30.0, 50.0, 80.0, 100.0])
STARTS = torch.cat([torch.zeros(1), X[:-1]])


def curve(onset, shape, size=1.0):
    after = (X - STARTS[onset]).clamp_min(0)
    return size * ((after > 0).float() if shape == 0 else after / after.max())


@pytest.mark.parametrize("size", [2.0, -0.01])
def test_planted_onsets_and_shapes_are_found_exactly(size):
    planted = [(onset, shape) for onset in range(6) for shape in (0, 1)]
    onsets, shapes = find_onsets(X, torch.stack([curve(*one, size) for one in planted]))
    assert onsets.tolist() == [onset for onset, _ in planted]
    assert shapes.tolist()[:-2] == [shape for _, shape in planted[:-2]]  # a single point has either shape


def naive(y):
    """The least squares fit among all shapes, one by one."""
    errors = {}
    for shape in (0, 1):
        for onset in range(6):
            basis = curve(onset, shape).double()
            errors[onset, shape] = float((y - basis * (basis @ y) / (basis @ basis)).square().sum())
    return min(errors, key=errors.get)


def test_the_fit_is_the_least_squares_one():
    curves = torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(0)).double()
    onsets, shapes = find_onsets(X, curves)
    assert onsets.shape == shapes.shape == (3, 40)
    for row, onset, shape in zip(curves.flatten(0, 1), onsets.flatten(), shapes.flatten(), strict=True):
        best = naive(row)
        assert onset == best[0]
        assert shape == best[1] or onset == 5


@pytest.mark.parametrize("shape", [0, 1])
def test_intervals_hold_planted_onsets(shape):
    """At a noise that blurs onsets, 95 % intervals hold them in about 95 % of latents, and are wider than a point."""
    n, n_curves = 40, 120
    generator = torch.Generator().manual_seed(1)
    planted = torch.randint(0, 5, (n_curves,), generator=generator)
    truth = torch.stack([curve(int(onset), shape) for onset in planted], 1)  # [point, curve]
    strength = 1 + 0.5 * torch.randn(n, n_curves, generator=generator)
    noise = 0.9 * torch.randn(6, n, n_curves, generator=generator)
    weights = bootstrap_weights(n, 300, seed=0)
    low, high = onset_intervals(X, truth[:, None] * strength + noise, weights)
    held = float(((low <= planted) & (planted <= high)).float().mean())
    assert held > 0.9
    assert 0.1 < float((high > low).float().mean()) < 1
    assert bool((low <= high).all())
    sharp = onset_intervals(X, truth[:, None] * strength, weights)
    assert sharp.tolist() == [planted.tolist()] * 2


def test_parts_are_those_of_all_together(monkeypatch):
    values = torch.randn(6, 10, 30, generator=torch.Generator().manual_seed(2))
    weights = bootstrap_weights(10, 50, seed=0)
    together = onset_intervals(X, values, weights)
    monkeypatch.setattr("saetools.onset._ELEMENTS", 1)
    assert torch.equal(onset_intervals(X, values, weights), together)
    assert onset_intervals(X, values[..., :0], weights).shape == (2, 0)
