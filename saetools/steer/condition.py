"""When an edit acts: conditions on a token's own residual, and a strength that changes as answers grow."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saetools.errors import InputError
from saetools.models.where import Where
from saetools.sae.model import SAE
from saetools.steer.numbers import check_direction, check_latents, check_name, finite, written
from saetools.steer.seen import Seen


@dataclass(frozen=True, eq=False)
class LatentAbove:
    """Where a latent is active, or above a threshold."""

    sae: SAE
    latent: int
    threshold: float | None

    def __call__(self, seen: Seen) -> Bool[Tensor, "row pos"]:
        """The tokens."""
        f = seen.latent(self.sae, self.latent)
        return f != 0 if self.threshold is None else f > self.threshold

    def structure(self) -> Hashable:
        """What has to be equal for two conditions to be one."""
        return id(self.sae), self.latent, self.threshold

    def __repr__(self) -> str:
        return str(self.latent) + ("" if self.threshold is None else f">{written(self.threshold)}")


@dataclass(frozen=True, eq=False)
class ProbeAbove:
    """Where a linear probe is above a threshold."""

    direction: Float[Tensor, " d_model"]
    threshold: float
    name: str

    def __call__(self, seen: Seen) -> Bool[Tensor, "row pos"]:
        """The tokens."""
        seen.check_width(len(self.direction))
        return seen.x.detach() @ self.direction.to(seen.x) > self.threshold

    def structure(self) -> Hashable:
        """What has to be equal for two conditions to be one."""
        return self.direction.data_ptr(), self.direction.shape, self.threshold

    def __repr__(self) -> str:
        return f"{self.name or 'a probe'}>{written(self.threshold)}"


Condition = LatentAbove | ProbeAbove
"""Says on which tokens an edit acts, by the residual as the edit finds it; prints as it is written."""


def active(sae: SAE, latent: int, *, above: float | None = None) -> LatentAbove:
    """A condition: the latent is active, or its activation is above a threshold.

    Args:
        sae: the SAE.
        latent: one of its latents.
        above: in units of the unscaled residual stream; by default whatever is not 0.

    Raises:
        InputError: for a latent that does not exist, or a threshold that is not finite.

    Example:
        >>> sae = load_sae(shipped_path("sae/smollm2-135m"))
        >>> active(sae, 77), active(sae, 77, above=0.5)
        (77, 77>0.5)
    """
    (chosen,) = check_latents(sae, latent).tolist()
    return LatentAbove(sae, chosen, None if above is None else finite("above", above))


def probe(direction: Float[Tensor, " d_model"], *, above: float = 0.0, name: str = "") -> ProbeAbove:
    """A condition: a linear probe's score v.x is above a threshold (for w.x + b > 0, pass above=-b).

    Raises:
        InputError: if the direction is not a finite vector, or the threshold not a finite number.
    """
    return ProbeAbove(check_direction(direction), finite("above", above), check_name(name))


@dataclass(frozen=True)
class Schedule:
    """Strength over the tokens of an answer: piecewise linear between points, constant before and after them.

    Args:
        points: (number of a generated token, weight of the change), by number; tokens that were given have number 0.
    """

    points: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, points: Mapping[int, float]) -> Schedule:
        """Points in any order.

        Raises:
            InputError: for no points, numbers below 0 or weights that are not finite.
        """
        if not points or min(points) < 0 or not all(math.isfinite(weight) for weight in points.values()):
            raise InputError(
                "points",
                expected="weights by number of the generated token, such as {0: 1.0, 32: 0.0}",
                received=dict(points),
                remedy="count tokens from 0 and pass finite weights",
            )
        return cls(tuple(sorted((int(step), float(weight)) for step, weight in points.items())))

    def __call__(self, where: Where) -> Float[Tensor, "row pos"]:
        """Weight of the change at each position.

        Raises:
            InputError: if it is not known how many tokens were given.
        """
        steps = where.known_steps.float()
        weights = torch.full_like(steps, self.points[0][1])
        for (start, before), (end, after) in zip(self.points, self.points[1:], strict=False):
            share = ((steps - start) / (end - start)).clamp(0, 1)
            weights = torch.where(steps >= start, before + (after - before) * share, weights)
        return weights

    def __str__(self) -> str:
        return "over " + ",".join(f"{step}:{written(weight)}" for step, weight in self.points)
