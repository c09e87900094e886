"""The TopK loss and its gradients, computed on the active pairs only.

Same numbers as autograd on the dense formula at the same active latents (a test holds them together to 1e-5); what is
saved is every product with a zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saetools.sae.sparse import TransposedPairs, combine, pair_dots, select_top


@dataclass(frozen=True)
class Weights:
    """The four weight tensors of an SAE, encoder kept as one row per latent; also used for their gradients."""

    encoder: Float[Tensor, "d_sae d_in"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_in"]


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
    """
    d_sae = len(weights.b_enc)
    centred = x - weights.b_dec
    encode_weight = weights.encoder.T.to(encode_dtype).contiguous()
    values, indices = select_top(centred.to(encode_dtype), encode_weight, weights.b_enc.to(encode_dtype), k)
    if encode_dtype != x.dtype:
        values = pair_dots(centred, weights.encoder, indices) + weights.b_enc[indices]
    values = values.relu()
    error = x - (combine(weights.W_dec, indices, values) + weights.b_dec)
    loss = error.square().mean()

    d_recon = error * (-2 / error.numel())
    pairs = TransposedPairs(indices, d_sae)
    d_values = torch.where(values > 0, pair_dots(d_recon, weights.W_dec, indices), 0.0)
    grads = Weights(
        encoder=pairs.sum_tokens(d_values, centred),
        W_dec=pairs.sum_tokens(values, d_recon),
        b_enc=torch.zeros_like(weights.b_enc).index_add_(0, indices.flatten(), d_values.flatten()),
        b_dec=d_recon.sum(0),
    )
    grads.b_dec.sub_(grads.b_enc @ weights.encoder)
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
    values, indices = select_top(centred, encoder.T.contiguous(), weights.b_enc[where], k_aux)
    values = values.relu()
    rest = error - combine(decoder, indices, values)
    scale = coefficient / error.square().sum().clamp_min(torch.finfo(error.dtype).tiny)
    d_recon = rest * (-2 * scale)
    d_values = torch.where(values > 0, pair_dots(d_recon, decoder, indices), 0.0)
    pairs = TransposedPairs(indices, len(where))
    grads.encoder.index_add_(0, where, pairs.sum_tokens(d_values, centred))
    grads.W_dec.index_add_(0, where, pairs.sum_tokens(values, d_recon))
    by_latent = torch.zeros_like(encoder[:, 0]).index_add_(0, indices.flatten(), d_values.flatten())
    grads.b_enc.index_add_(0, where, by_latent)
    return scale * rest.square().sum()
