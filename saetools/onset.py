"""When a curve that starts at 0 begins to move: a change point by least squares, with a bootstrap interval."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_ELEMENTS = 1 << 22  # of resampled curves x shapes that exist at the same time


def find_onsets(
    x: Float[Tensor, " point"], curves: Float[Tensor, "*batch point"]
) -> tuple[Int[Tensor, "*batch"], Int[Tensor, "*batch"]]:
    """Where curves begin to move, and whether they then rise like a step or a ramp.

    A curve is fitted by least squares as flat at 0 up to an onset c and, after it, either a constant level (step) or a
    line from 0 at c (ramp), up or down; c is 0 or one of the points but the last, and the best fit of all counts. So
    the onset is the last place where the curve is still at its start, as far as points tell.

    Args:
        x: the points, above 0 and ascending; every curve is 0 at x = 0.
        curves: values at the points.

    Returns:
        Of each curve: the place of c in [0, x_1, ..., x_(n-1)], and 0 for a step or 1 for a ramp.
    """
    shapes = _shapes(x)
    # Of curves of one length, the best fit is the one with the largest product with a shape of length 1.
    best = (curves.double() @ shapes.flatten(0, 1).T).abs().argmax(-1)
    return best % len(x), best // len(x)


def onset_intervals(
    x: Float[Tensor, " point"],
    values: Float[Tensor, "point unit curve"],
    weights: Float[Tensor, "resample unit"],
    *,
    level: float = 0.95,
) -> Int[Tensor, "2 curve"]:
    """Bootstrap intervals of the onsets of curves that are means over units.

    Args:
        x: the points, above 0 and ascending.
        values: of each unit at each point.
        weights: how often each unit is drawn in each resample, over the number of units (`stats.bootstrap_weights`).
        level: of the interval.

    Returns:
        First and last place of the onset, as `find_onsets` counts them: the shortest range of quantiles that leaves out
        at most (1 - level) / 2 of the resamples on either side.
    """
    n_points, _, n_curves = values.shape
    onsets = []
    size = max(1, _ELEMENTS // (len(weights) * 2 * n_points))
    for some in torch.split(values.double(), size, dim=2):
        resampled = torch.einsum("ru,puc->rcp", weights.double(), some)
        onsets.append(find_onsets(x, resampled)[0])
    ordered = torch.cat(onsets, dim=1).sort(0).values if n_curves else torch.zeros(len(weights), 0, dtype=torch.long)
    out = int((1 - level) / 2 * len(weights))
    return torch.stack([ordered[out], ordered[len(weights) - 1 - out]])


def _shapes(x: Float[Tensor, " point"]) -> Float[Tensor, "2 onset point"]:
    """A step and a ramp from every possible onset, each of length 1."""
    start = torch.cat([torch.zeros(1, dtype=torch.double), x[:-1].double()])
    after = (x.double() - start[:, None]).clamp_min(0)
    return torch.nn.functional.normalize(torch.stack([(after > 0).double(), after]), dim=2)
