"""Counts in equal bins."""

import torch

from saetools.histogram import Histogram


def test_every_value_is_counted_once_and_bins_are_equal():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    found = Histogram.of(values, n_bins=7)
    assert sum(found.counts) == 1000
    assert found.edges[0] == values.min()
    assert found.edges[-1] == values.max()
    for number, count in enumerate(found.counts):
        inside = (values >= found.edges[number]) & (values < found.edges[number + 1])
        assert abs(int(inside.sum()) - count) <= 1  # the largest value, and rounding of an edge
    assert found.mids[0] == (found.edges[0] + found.edges[1]) / 2


def test_values_outside_of_given_ends_do_not_count():
    assert Histogram.of(torch.tensor([-1.0, 0.5, 9.0]), n_bins=2, low=0.0, high=2.0).counts == (1, 0)


def test_no_values_and_equal_values():
    assert Histogram.of(torch.zeros(0)) == Histogram((), ())
    assert sum(Histogram.of(torch.zeros(0), n_bins=3, low=0.0, high=1.0).counts) == 0
    assert Histogram.of(torch.full((5,), 2.0), n_bins=2).counts == (5, 0)
