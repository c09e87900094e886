"""Edits of directions of the residual stream, in float32 or better."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.errors import InputError
from saetools.steer.changes import AffineMap, ComponentMap, Push
from saetools.steer.edits import Part, SteeringEdit
from saetools.steer.numbers import check_direction, check_name, finite, written


def add_direction(
    direction: Float[Tensor, " d_model"], strength: float, *, median_norm: float | None = None, name: str = ""
) -> SteeringEdit:
    """Push x along a direction: x + s v (arXiv 2506.11618), or x + s m v/|v| for a share of the typical norm.

    Args:
        direction: v.
        strength: s.
        median_norm: m, the median residual norm at the site, as in an SAE's metadata; by default s is in units of v.
        name: how the direction is called where the edit is printed.

    Raises:
        InputError: if the direction is not a finite vector, or zero where it has to have a length; if a number is not
            finite.

    Example:
        >>> add_direction(torch.tensor([3.0, 4.0]), -2.0)
        add_direction (norm 5)=-2
        >>> add_direction(torch.ones(4), 0.1, median_norm=5.0, name="evil")
        add_direction evil=0.1*norm
    """
    vector = check_direction(direction, nonzero=median_norm is not None)
    strength = finite("strength", strength)
    step = strength * vector
    if median_norm is not None:
        step = strength * finite("median_norm", median_norm) * torch.nn.functional.normalize(vector, dim=0)
    unit = "" if median_norm is None else "*norm"
    return SteeringEdit([Part(Push(f"add_direction {_called(vector, name)}={written(strength)}{unit}", step))])


def project_out(
    direction: Float[Tensor, " d_model"] | Float[Tensor, "direction d_model"], *, name: str = ""
) -> SteeringEdit:
    """Remove the component along a direction: x - v v.x / v.v (arXiv 2506.11618); of several, all of their span.

    Args:
        direction: v, or several.
        name: how the direction is called where the edit is printed; of several, their names with commas.

    Raises:
        InputError: if the direction is zero or not finite, or some of several depend on one another.

    Example:
        >>> project_out(torch.ones(4), name="evil").on("generated")
        project_out evil on generated
    """
    basis = _orthonormal(direction)
    zeros = torch.zeros(len(basis), dtype=torch.double)
    names = ",".join(map(check_name, name.split(","))) if direction.ndim == 2 else name
    text = f"project_out {names if direction.ndim == 2 and names else _called(direction, name)}"
    return SteeringEdit([Part(ComponentMap(text, basis, zeros, zeros))])


def project_to(direction: Float[Tensor, " d_model"], value: float, *, name: str = "") -> SteeringEdit:
    """Set the component along a direction: x + (c - x.v/|v|) v/|v|.

    Raises:
        InputError: if the direction is zero or not finite, or the value not finite.

    Example:
        >>> project_to(torch.ones(4), 2.5, name="evil")
        project_to evil=2.5
    """
    value = finite("value", value)
    at = torch.tensor([value], dtype=torch.double)
    text = f"project_to {_called(direction, name)}={written(value)}"
    return SteeringEdit([Part(ComponentMap(text, _unit(direction), at, at))])


def mean_ablate(
    direction: Float[Tensor, " d_model"], mean: Float[Tensor, " d_model"], *, name: str = ""
) -> SteeringEdit:
    """Set the component along a direction to that of a mean residual: `project_to` its mean.

    Args:
        direction: v.
        mean: the mean residual of reference texts at the site, such as an SAE's `b_dec` where it is trained to be that.
        name: how the direction is called where the edit is printed.

    Raises:
        InputError: if a vector is not finite or of another length, or the direction is zero.
    """
    unit, given = _unit(direction)[0], check_direction(mean, argument="mean")
    if len(given) != len(unit):
        raise InputError("mean", expected=f"length {len(unit)}", received=len(given), remedy="pass that of this site")
    return project_to(direction, float(given.to(unit) @ unit), name=name)


def cap(
    direction: Float[Tensor, " d_model"],
    *,
    low: float = -math.inf,
    high: float = math.inf,
    name: str = "",
) -> SteeringEdit:
    """Keep the component along a direction between two bounds: x + (min(max(c, low), high) - c) v/|v|, c = x.v/|v|.

    Args:
        direction: v.
        low: least component.
        high: largest component.
        name: how the direction is called where the edit is printed.

    Raises:
        InputError: if the direction is zero or not finite, or the bounds are NaN or the wrong way round.

    Example:
        >>> cap(torch.ones(4), high=2.0, name="evil"), cap(torch.ones(4), low=-1.0, high=1.0, name="evil")
        (cap evil=..2, cap evil=-1..1)
    """
    if math.isnan(low) or math.isnan(high) or low == math.inf or high == -math.inf:
        raise InputError(
            "low", expected="bounds that are numbers, or left out", received=f"{low} and {high}", remedy="mend them"
        )
    if low > high:
        raise InputError("low", expected=f"at most high, {high}", received=low, remedy="swap them")
    ends = ["" if math.isinf(end) else written(end) for end in (low, high)]
    bounds = [torch.tensor([end], dtype=torch.double) for end in (low, high)]
    text = f"cap {_called(direction, name)}={'..'.join(ends)}"
    return SteeringEdit([Part(ComponentMap(text, _unit(direction), *bounds))])


def affine(
    matrix: Float[Tensor, "d_model d_model"], bias: Float[Tensor, " d_model"] | None = None, *, name: str = ""
) -> SteeringEdit:
    """Any affine map: x' = A x + b, such as a concept eraser.

    Raises:
        InputError: if the matrix is not square or finite, or the bias does not fit it.

    Example:
        >>> affine(0.5 * torch.eye(4), name="halve")
        affine halve
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not bool(torch.isfinite(matrix).all()):
        raise InputError(
            "matrix", expected="a finite square matrix", received=tuple(matrix.shape), remedy="pass [d_model, d_model]"
        )
    matrix = matrix.detach().to("cpu", torch.promote_types(matrix.dtype, torch.float32))
    shift = matrix.new_zeros(len(matrix)) if bias is None else check_direction(bias, argument="bias").to(matrix)
    if len(shift) != len(matrix):
        raise InputError("bias", expected=f"length {len(matrix)}", received=len(shift), remedy="pass one that fits")
    change = AffineMap(f"affine {check_name(name) or 'a matrix'}", matrix - torch.eye(len(matrix)).to(matrix), shift)
    return SteeringEdit([Part(change)])


def _unit(direction: Tensor) -> Float[Tensor, "1 d_model"]:
    vector: Tensor = check_direction(direction, nonzero=True)
    return torch.nn.functional.normalize(vector, dim=0)[None]


def _orthonormal(direction: Tensor) -> Float[Tensor, "direction d_model"]:
    if direction.ndim == 1:
        return _unit(direction)
    if not len(direction):
        raise InputError("direction", expected="at least one", received="none", remedy="pass [direction, d_model]")
    units = torch.cat([_unit(one) for one in direction])
    basis = torch.linalg.svd(units.double(), full_matrices=False)
    if float(basis.S.min()) < 1e-6:
        raise InputError(
            "direction",
            expected="directions that do not depend on one another",
            received=f"{len(units)} of rank {int((basis.S >= 1e-6).sum())}",
            remedy="drop some",
        )
    vectors: Tensor = basis.Vh
    return vectors.to(units)


def _called(direction: Tensor, name: str) -> str:
    if check_name(name):
        return name
    if direction.ndim == 1:
        return f"(norm {torch.linalg.vector_norm(direction.float()):g})"
    return f"({len(direction)} directions)"
