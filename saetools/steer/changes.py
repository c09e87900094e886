"""What an edit does to a residual: a few kinds, each a small map with numbers that may differ from row to row.

In a batch whose rows have edits of their own, edits that differ in numbers alone run as one: then tensors have a first
dimension for the edit, and `own` picks those of the rows of a pass.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.sae.model import SAE
from saetools.steer.seen import Seen

_Change = TypeVar("_Change", bound="Change")


@dataclass(frozen=True, eq=False)
class Change:
    """One kind of change; its tensors are on the CPU until it is moved.

    Args:
        text: how it is written.
    """

    text: str

    def structure(self) -> Hashable:
        """What has to be equal for two changes to run as one."""
        tensors = tuple((name, value.shape, value.dtype) for name, value in self._tensors().items())
        return type(self), tensors

    def stacked(self: _Change, others: Sequence[_Change]) -> _Change:
        """Several changes as one."""
        stacks: dict[str, Any] = {name: torch.stack([getattr(one, name) for one in others]) for name in self._tensors()}
        return replace(self, **stacks)

    def to(self: _Change, device: torch.device) -> _Change:
        """The same with its tensors on a device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def own(numbers: Tensor, local: Tensor | None) -> Tensor:
    """Numbers of the rows of a pass, with a dimension for the position; if they are not stacked, those of all rows."""
    return numbers if local is None else numbers[local][:, None]


@dataclass(frozen=True, eq=False)
class LatentMap(Change):
    """f' = min(max(factor f + shift, low), high), on some latents; the rest of x stays.

    Args:
        sae: the SAE.
        latents: which; none twice.
        numbers: factor, shift, low and high of each.
        only_if_active: leave a latent alone on tokens where it is inactive.
    """

    sae: SAE
    latents: Int[Tensor, "*edit latent"]
    numbers: Float[Tensor, "*edit 4 latent"]
    only_if_active: bool

    def structure(self) -> Hashable:
        """What has to be equal for two changes to run as one."""
        return super().structure(), id(self.sae), self.only_if_active, self.is_constant

    def vector(self) -> Float[Tensor, " d_model"] | None:
        """What it adds to x, where that is the same on every token."""
        if not self.is_constant or self.sae.input_norm != "none":
            return None
        rows = self.sae.W_dec.detach()[self.latents.to(self.sae.W_dec.device)].double().cpu()
        return (self.numbers[1].cpu() @ rows).float()

    @property
    def is_constant(self) -> bool:
        """Whether it only adds to activations, whatever they are."""
        factor, _, low, high = self.numbers.unbind(-2)
        return not self.only_if_active and bool(
            (factor == 1).all() and (low == -torch.inf).all() and (high == torch.inf).all()
        )

    def mapped(
        self, f: Float[Tensor, "row pos latent"], local: Int[Tensor, " row"] | None
    ) -> Float[Tensor, "row pos latent"]:
        """The new activations."""
        factor, shift, low, high = own(self.numbers.to(f.dtype), local).unbind(-2)
        return torch.minimum(torch.maximum(f * factor + shift, low), high)


@dataclass(frozen=True, eq=False)
class Push(Change):
    """x' = x + vector.

    Args:
        vector: what is added.
    """

    vector: Float[Tensor, "*edit d_model"]

    def __call__(self, seen: Seen, local: Int[Tensor, " row"] | None) -> Tensor:
        """What is added to x."""
        seen.check_width(self.vector.shape[-1])
        return own(self.vector, local)


@dataclass(frozen=True, eq=False)
class ComponentMap(Change):
    """Components of x along orthonormal directions, brought between two bounds.

    Args:
        basis: the directions.
        low: least component.
        high: largest component.
    """

    basis: Float[Tensor, "*edit direction d_model"]
    low: Float[Tensor, "*edit direction"]
    high: Float[Tensor, "*edit direction"]

    def __call__(self, seen: Seen, local: Int[Tensor, " row"] | None) -> Float[Tensor, "row pos d_model"]:
        """What is added to x."""
        seen.check_width(self.basis.shape[-1])
        basis, low, high = (one.to(seen.x.dtype) for one in (self.basis, self.low, self.high))
        basis = basis if local is None else basis[local]
        along = seen.x @ basis.mT
        return (torch.minimum(torch.maximum(along, own(low, local)), own(high, local)) - along) @ basis


@dataclass(frozen=True, eq=False)
class AffineMap(Change):
    """x' = x + matrix x + bias.

    Args:
        matrix: less the identity.
        bias: what is added.
    """

    matrix: Float[Tensor, "*edit d_model d_model"]
    bias: Float[Tensor, "*edit d_model"]

    def __call__(self, seen: Seen, local: Int[Tensor, " row"] | None) -> Float[Tensor, "row pos d_model"]:
        """What is added to x."""
        seen.check_width(self.bias.shape[-1])
        matrix, bias = self.matrix.to(seen.x.dtype), self.bias.to(seen.x.dtype)
        matrix = matrix if local is None else matrix[local]
        return seen.x @ matrix.mT + own(bias, local)
