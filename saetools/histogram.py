"""Counts of numbers in equal bins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Histogram:
    """How many numbers fell into each of some bins of equal width.

    Args:
        edges: ends of the bins, ascending; one more than there are bins.
        counts: numbers in each bin, its lower end included; the last bin includes its upper end too.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(
        cls, values: Float[Tensor, " value"], *, n_bins: int = 40, low: float | None = None, high: float | None = None
    ) -> Histogram:
        """Count values.

        Args:
            values: finite numbers; those outside of the bins are not counted.
            n_bins: bins.
            low: where the first bin begins; by default at the smallest value.
            high: where the last one ends; by default at the largest value.

        Returns:
            The histogram; without any bin if there are no values and no ends.

        Example:
            >>> Histogram.of(torch.tensor([0.0, 0.5, 3.0, 4.0]), n_bins=2)
            Histogram(edges=(0.0, 2.0, 4.0), counts=(2, 2))
        """
        if not len(values) and (low is None or high is None):
            return cls((), ())
        first = float(values.min()) if low is None else low
        last = float(values.max()) if high is None else high
        if last <= first:
            last = first + 1.0
        counts = torch.histc(values.float().cpu(), n_bins, first, last)
        edges = [first + (last - first) * number / n_bins for number in range(n_bins + 1)]
        return cls(tuple(edges), tuple(int(count) for count in counts.tolist()))

    @property
    def mids(self) -> tuple[float, ...]:
        """The middle of each bin."""
        return tuple((left + right) / 2 for left, right in zip(self.edges, self.edges[1:], strict=False))
