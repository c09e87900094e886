"""The TopK loss and its gradients, computed on the active pairs only.

Same numbers as autograd on the dense formula at the same active latents (a test holds them together to 1e-5); what is
saved is every product with a zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saetools.sae.sparse import LatentMajorPairs, combine, select_top


@dataclass(frozen=True)
class Weights:
    """The four weight tensors of an SAE, encoder kept as one row per latent; also used for their gradients."""

    encoder: Float[Tensor, "d_sae d_in"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_in"]

    def empty_like(self) -> Weights:
        """Uninitialised tensors of the same shapes, to write gradients to."""
        return Weights(*(torch.empty_like(weight) for weight in vars(self).values()))


@dataclass(frozen=True)
class StepResult:
    """Loss of one batch, its gradients, and what the log needs.

    Args:
        loss: mean over tokens and dimensions of the squared error, plus the weighted auxiliary loss.
        grads: of that loss.
        error: x - x', per token.
        indices: selected latents.
        values: their activations.
    """

    loss: Float[Tensor, ""]
    grads: Weights
    error: Float[Tensor, "token d_in"]
    indices: Int[Tensor, "token k"]
    values: Float[Tensor, "token k"]


@torch.no_grad()
def topk_step(
    x: Float[Tensor, "token d_in"],
    weights: Weights,
    k: int,
    *,
    encode_dtype: torch.dtype = torch.float32,
    dead: Bool[Tensor, " d_sae"] | None = None,
    k_aux: int = 256,
    aux_coefficient: float = 1 / 32,
    grads: Weights | None = None,
) -> StepResult:
    """Loss and gradients of a TopK SAE on one batch.

    Args:
        x: activations, scaled as the weights expect.
        weights: current weights.
        k: active latents a token.
        encode_dtype: dtype of the encoder product that chooses the latents. In `bfloat16` it takes less than half the
            time; the values of the chosen ones are computed in the dtype of the weights either way.
        dead: latents that have not fired for long; they learn to reconstruct the error (AuxK, arXiv 2406.04093).
        k_aux: dead latents a token uses for that.
        aux_coefficient: weight of that loss.
        grads: tensors to overwrite with the gradients; fresh memory for them in every step would cost time.
    """
    grads = weights.empty_like() if grads is None else grads
    centred = x - weights.b_dec
    encode_weight = weights.encoder.to(encode_dtype).T
    values, indices = select_top(centred.to(encode_dtype), encode_weight, weights.b_enc.to(encode_dtype), k)
    pairs = LatentMajorPairs(indices, len(weights.b_enc))
    if encode_dtype != x.dtype:
        values = pairs.scatter(pairs.dots(weights.encoder, centred) + weights.b_enc[pairs.latents])
    values = values.relu_()
    error = centred - combine(weights.W_dec, indices, values)
    loss = _square_sum(error) / error.numel()

    slope = -2 / error.numel()  # of the loss, by the error: d_recon = slope * error
    active = pairs.gather(values)
    d_active = torch.where(active > 0, pairs.dots(weights.W_dec, error) * slope, 0.0)
    pairs.sum_tokens(d_active, centred, out=grads.encoder)
    pairs.sum_tokens(active * slope, error, out=grads.W_dec)
    grads.b_enc.copy_(pairs.sums(d_active))
    grads.b_dec.copy_(slope * error.sum(0) - grads.b_enc @ weights.encoder)
    if dead is not None and bool(dead.any()):
        loss = loss + _add_aux(centred, error, weights, grads, dead, min(k_aux, int(dead.sum())), aux_coefficient)
    return StepResult(loss, grads, error, indices, values)


def _add_aux(
    centred: Tensor, error: Tensor, weights: Weights, grads: Weights, dead: Tensor, k_aux: int, coefficient: float
) -> Tensor:
    """Add the gradients of coefficient * ||error - dead latents' reconstruction||^2 / ||error||^2; returns the loss.

    The error is a constant here, and so is b_dec: dead latents are to learn, nothing else.
    """
    where = dead.nonzero()[:, 0]
    encoder, decoder = weights.encoder[where], weights.W_dec[where]
    values, indices = select_top(centred, encoder.T, weights.b_enc[where], k_aux)
    values = values.relu_()
    rest = error - combine(decoder, indices, values)
    scale = coefficient / _square_sum(error).clamp_min(torch.finfo(error.dtype).tiny)
    pairs = LatentMajorPairs(indices, len(where))
    active = pairs.gather(values)
    d_active = torch.where(active > 0, pairs.dots(decoder, rest) * (-2 * scale), 0.0)
    grads.encoder.index_add_(0, where, pairs.sum_tokens(d_active, centred))
    grads.W_dec.index_add_(0, where, pairs.sum_tokens(active * (-2 * scale), rest))
    grads.b_enc.index_add_(0, where, pairs.sums(d_active))
    return scale * _square_sum(rest)


def _square_sum(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm.square()
