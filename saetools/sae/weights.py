"""The tensors that training changes, one small class per kind of SAE; the same classes hold their gradients."""

from __future__ import annotations

from dataclasses import dataclass
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


def empty_like(weights: AnyWeights) -> AnyWeights:
    """Uninitialised tensors of the same shapes, to write gradients to."""
    return type(weights)(*(torch.empty_like(weight) for weight in vars(weights).values()))
