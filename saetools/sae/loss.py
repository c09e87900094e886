"""The losses of sparse kinds and their gradients, computed on the active pairs only.

Same numbers as autograd on the dense formula at the same active latents (a test holds them together to 1e-5); what is
saved is every product with a zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saetools.sae.sparse import (
    LatentMajorPairs,
    TokenMajorPairs,
    combine,
    select_batch_top,
    select_top,
    select_top_of_candidates,
)
from saetools.sae.weights import Weights, empty_like
from saetools.team import ALONE, Team


@dataclass(frozen=True)
class StepResult:
    """Loss of one batch, its gradients, and what the log needs.

    Args:
        loss: mean over tokens of the squared error, plus the weighted auxiliary loss.
        grads: of that loss.
        error: x - x', per token.
        indices: selected latents.
        values: their activations.
        n_tokens: tokens of the whole batch.
    """

    loss: Float[Tensor, ""]
    grads: Weights
    error: Float[Tensor, "token d_in"]
    indices: Int[Tensor, "token k"]
    values: Float[Tensor, "token k"]
    n_tokens: int


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
    team: Team = ALONE,
) -> StepResult:
    """Loss and gradients of a TopK SAE on one batch.

    Decoder rows have any length here. Latents are chosen by pre-activation times length of the row, which is what the
    activation will be once rows have length 1.

    Args:
        x: activations, scaled as the weights expect.
        weights: current weights.
        k: active latents a token.
        encode_dtype: dtype of the encoder product that chooses the latents. In `bfloat16` it takes less than half the
            time of `float32`, in `int8` half of that; the values of the chosen ones are computed in the dtype of the
            weights in any case, and from `int8` a quarter more latents are chosen, the best k of which remain.
        dead: latents that have not fired for long; they learn to reconstruct the error (AuxK, arXiv 2406.04093).
        k_aux: dead latents a token uses for that.
        aux_coefficient: weight of that loss.
        grads: tensors to overwrite with the gradients, and to compute in before; fresh memory for them in every step
            would cost time.
        team: processes that share the batch or the latents; `x`, `weights` and `dead` are this one's part, the loss is
            that of all.
    """
    grads = empty_like(weights) if grads is None else grads
    centred = x - weights.b_dec
    encoder, bias, lengths = _by_length(weights.encoder, weights.b_enc, weights.W_dec, out=grads.encoder)
    strength, indices, pairs = _choose(centred, encoder, bias, min(k, len(bias)), encode_dtype)
    values = team.keep_top(strength.relu_(), k).div_(lengths[indices])
    error = centred - team.over_latents(combine(weights.W_dec, indices, values))
    n_all = n_tokens(x, team)
    loss = team.over_tokens(_square_sum(error)) / n_all
    slope = -2 / n_all  # of the loss, by the error: d_recon = slope * error
    _write_gradients(pairs, pairs.gather(values), centred, error, slope, weights, grads)
    grads.b_dec.copy_(slope * error.sum(0) - team.over_latents(grads.b_enc @ weights.encoder))
    if dead is not None:
        loss = loss + _add_aux(centred, error, weights, grads, dead, k_aux, aux_coefficient, team)
    for grad in vars(grads).values():
        team.over_tokens(grad)
    return StepResult(loss, grads, error, indices, values, n_all)


def n_tokens(x: Float[Tensor, "token d_in"], team: Team) -> int:
    """Tokens of the whole batch."""
    return int(team.over_tokens(torch.tensor(len(x), device=x.device)))


def _choose(
    centred: Tensor, encoder: Tensor, bias: Tensor, k: int, encode_dtype: torch.dtype
) -> tuple[Tensor, Tensor, LatentMajorPairs]:
    """The k largest pre-activations of each token, their latents, and the pairs."""
    d_sae = len(bias)
    if encode_dtype == torch.int8:
        values, indices = select_top_of_candidates(centred, encoder, bias, k, n=k + -(-k // 4), dtype=encode_dtype)
        return values, indices, LatentMajorPairs(indices, d_sae)
    values, indices = select_top(centred.to(encode_dtype), encoder.to(encode_dtype).T, bias.to(encode_dtype), k)
    pairs = LatentMajorPairs(indices, d_sae)
    exact = values if encode_dtype == centred.dtype else pairs.pre_activations(centred, encoder, bias)
    return exact, indices, pairs


@torch.no_grad()
def batch_topk_step(
    x: Float[Tensor, "token d_in"],
    weights: Weights,
    k: int,
    *,
    widths: Sequence[int] | None = None,
    encode_dtype: torch.dtype = torch.float32,
    dead: Bool[Tensor, " d_sae"] | None = None,
    k_aux: int = 256,
    aux_coefficient: float = 1 / 32,
    grads: Weights | None = None,
    team: Team = ALONE,
) -> BatchTopKResult:
    """Loss and gradients of a BatchTopK SAE (arXiv 2412.06410), or of a Matryoshka one (arXiv 2503.17547).

    Args:
        x: activations, scaled as the weights expect.
        weights: current weights.
        k: active latents a token, on average over the batch.
        widths: for Matryoshka SAEs, the numbers of latents that have to reconstruct by themselves, ascending, the last
            of them d_sae (of all processes); the loss is the mean over them.
        encode_dtype: as for `topk_step`.
        dead: as for `topk_step`.
        k_aux: as for `topk_step`.
        aux_coefficient: as for `topk_step`.
        grads: as for `topk_step`.
        team: as for `topk_step`.
    """
    grads = empty_like(weights) if grads is None else grads
    n_all = n_tokens(x, team)
    centred = x - weights.b_dec
    encoder, bias, lengths = _by_length(weights.encoder, weights.b_enc, weights.W_dec, out=grads.encoder)
    active = select_batch_top(centred.to(encode_dtype), encoder.to(encode_dtype).T, bias.to(encode_dtype), k * n_all)
    if team.size > 1:
        active = active[team.among_top(active.values, k * n_all).nonzero()[:, 0]]
    slope = -2 / n_all
    ends = [0, *(map(team.n_own_latents, widths) if widths else [len(weights.b_enc)])]
    groups = [
        _Group.of(active, slice(*bounds), centred, encoder, bias, lengths, exact=encode_dtype == x.dtype)
        for bounds in pairwise(ends)
    ]
    errors, error = [], centred
    for group in groups:
        error = error - team.over_latents(group.active.combine(weights.W_dec[group.rows]))
        errors.append(error)
    loss = team.over_tokens(torch.stack([_square_sum(each) for each in errors]).mean()) / n_all
    rest = torch.zeros_like(x)
    for group, each in zip(reversed(groups), reversed(errors), strict=True):
        rest += each / len(groups)  # a latent answers for its own prefix and for all longer ones
        _write_gradients(
            group.pairs, group.pairs.gather(group.active.values), centred, rest, slope, weights, grads, group.rows
        )
    grads.b_dec.copy_(slope * rest.sum(0) - team.over_latents(grads.b_enc @ weights.encoder))
    if dead is not None:
        loss = loss + _add_aux(centred, error, weights, grads, dead, k_aux, aux_coefficient, team)
    for grad in vars(grads).values():
        team.over_tokens(grad)
    latents = torch.cat([group.active.latents + group.rows.start for group in groups])
    strength = torch.cat([group.active.values for group in groups]) * lengths[latents]
    return BatchTopKResult(loss, grads, error, latents, strength, n_all)


@dataclass(frozen=True)
class BatchTopKResult:
    """Loss of one batch, its gradients, and the active pairs.

    Args:
        loss: mean over tokens and widths of the squared error, plus the weighted auxiliary loss.
        grads: of that loss.
        error: x - x' with all latents, per token.
        latents: of the active pairs.
        strength: their activations times the lengths of their decoder rows, all above 0 but for rounding.
        n_tokens: tokens of the whole batch.
    """

    loss: Float[Tensor, ""]
    grads: Weights
    error: Float[Tensor, "token d_in"]
    latents: Int[Tensor, " pair"]
    strength: Float[Tensor, " pair"]
    n_tokens: int


@dataclass(frozen=True)
class _Group:
    """Active pairs of neighbouring latents, which are counted from the first of them."""

    rows: slice
    active: TokenMajorPairs
    pairs: LatentMajorPairs

    @classmethod
    def of(
        cls,
        active: TokenMajorPairs,
        rows: slice,
        centred: Tensor,
        encoder: Tensor,
        bias: Tensor,
        lengths: Tensor,
        *,
        exact: bool,
    ) -> _Group:
        own = active[((active.latents >= rows.start) & (active.latents < rows.stop)).nonzero()[:, 0]]
        latents = own.latents - rows.start
        pairs = LatentMajorPairs(latents, rows.stop - rows.start, tokens=own.tokens, n_tokens=own.n_tokens)
        strength = own.values if exact else pairs.pre_activations(centred, encoder[rows], bias[rows])
        values = strength.relu() / lengths[own.latents]
        return cls(rows, TokenMajorPairs(own.tokens, latents, values, own.n_tokens), pairs)


def _write_gradients(
    pairs: LatentMajorPairs,
    active: Float[Tensor, " pair"],
    centred: Tensor,
    error: Tensor,
    slope: float,
    weights: Weights,
    grads: Weights,
    rows: slice = slice(None),
) -> None:
    """Gradients of `encoder`, `W_dec` and `b_enc` of some latents, from the error they answer for."""
    d_active = torch.where(active > 0, pairs.dots(weights.W_dec[rows], error) * slope, 0.0)
    pairs.sum_tokens(d_active, centred, out=grads.encoder[rows])
    pairs.sum_tokens(active * slope, error, out=grads.W_dec[rows])
    grads.b_enc[rows].copy_(pairs.sums(d_active))


def _add_aux(
    centred: Tensor,
    error: Tensor,
    weights: Weights,
    grads: Weights,
    dead: Tensor,
    k_aux: int,
    coefficient: float,
    team: Team,
) -> Tensor:
    """Add the gradients of coefficient * d_in * ||error - dead latents' reconstruction||^2 / ||error||^2; returns it.

    With inputs of norm sqrt(d_in), the loss beside it is d_in times the share of variance unexplained. The error is a
    constant here, and so is b_dec: dead latents are to learn, nothing else.
    """
    n_dead = int(team.over_latents(dead.sum()))
    if not n_dead:
        return error.new_zeros(())
    where = dead.nonzero()[:, 0]
    encoder, decoder = weights.encoder[where], weights.W_dec[where]
    k_own = min(k_aux, len(where))
    encoder, bias, lengths = _by_length(encoder, weights.b_enc[where], decoder, out=encoder)
    strength, indices = select_top(centred, encoder.T, bias, k_own)
    n_empty = min(k_aux, n_dead) - k_own  # slots that only other processes fill
    strength = torch.nn.functional.pad(strength.relu_(), (0, n_empty))
    values = team.keep_top(strength, min(k_aux, n_dead))[:, :k_own] / lengths[indices]
    rest = error - team.over_latents(combine(decoder, indices, values))
    size = team.over_tokens(_square_sum(error)).clamp_min(torch.finfo(error.dtype).tiny)
    scale = coefficient * error.shape[1] / size
    pairs = LatentMajorPairs(indices, len(where))
    active = pairs.gather(values)
    d_active = torch.where(active > 0, pairs.dots(decoder, rest) * (-2 * scale), 0.0)
    grads.encoder.index_add_(0, where, pairs.sum_tokens(d_active, centred))
    grads.W_dec.index_add_(0, where, pairs.sum_tokens(active * (-2 * scale), rest))
    grads.b_enc.index_add_(0, where, pairs.sums(d_active))
    return scale * team.over_tokens(_square_sum(rest))


def _by_length(encoder: Tensor, bias: Tensor, decoder: Tensor, *, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder, written to `out`, and bias times the lengths of decoder rows, as latents are chosen; and the lengths."""
    lengths = torch.linalg.vector_norm(decoder, dim=1).clamp_min_(1e-8)
    return torch.mul(encoder, lengths[:, None], out=out), bias * lengths, lengths


def _square_sum(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm.square()
