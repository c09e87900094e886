"""The tensors that training changes, one small class per kind of SAE; the same classes hold their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """The four tensors that every SAE has, encoder kept as one row per latent."""

    encoder: Float[Tensor, "d_sae d_in"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_in"]

    def by_latent(self) -> dict[str, Float[Tensor, "d_sae ..."]]:
        """All but `b_dec`, by name: what processes that divide the latents hold a part of."""
        return {name: tensor for name, tensor in vars(self).items() if name != "b_dec"}


@dataclass(frozen=True)
class GatedWeights(Weights):
    """Those of a gated SAE, whose gate has the bias `b_enc`."""

    r_mag: Float[Tensor, " d_sae"]
    b_mag: Float[Tensor, " d_sae"]


@dataclass(frozen=True)
class JumpReLUWeights(Weights):
    """Those of a JumpReLU SAE."""

    log_threshold: Float[Tensor, " d_sae"]


AnyWeights = TypeVar("AnyWeights", bound=Weights)


def map_latents(weights: AnyWeights, change: Callable[[Tensor], Tensor]) -> AnyWeights:
    """Weights with every tensor changed but `b_dec`."""
    return replace(weights, **{name: change(tensor) for name, tensor in weights.by_latent().items()})


def empty_like(weights: AnyWeights) -> AnyWeights:
    """Uninitialised tensors of the same shapes, to write gradients to."""
    return type(weights)(*(torch.empty_like(weight) for weight in vars(weights).values()))
