"""Losses of kinds that become sparse as they learn, through autograd, a bounded chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saetools.sae.loss import n_tokens
from saetools.sae.sparse import chunk_tokens
from saetools.sae.weights import Weights
from saetools.team import ALONE, Team


@dataclass(frozen=True)
class Step:
    """What came of a batch; its gradients are in the tensors that were given.

    Args:
        loss: what was minimised.
        error: x - x', per token.
        fired: latents that were active on some token.
        n_active: active (token, latent) pairs.
        n_tokens: tokens of the whole batch.
    """

    loss: Float[Tensor, ""]
    error: Float[Tensor, "token d_in"]
    fired: Bool[Tensor, " d_sae"]
    n_active: Int[Tensor, ""]
    n_tokens: int


def dense_step(
    x: Float[Tensor, "token d_in"],
    weights: Weights,
    grads: Weights,
    chunk_loss: Callable[
        [Float[Tensor, "chunk d_in"], Weights],
        tuple[Float[Tensor, ""], Float[Tensor, "chunk d_in"], Float[Tensor, "chunk d_sae"]],
    ],
    *,
    encode_dtype: torch.dtype = torch.float32,
    team: Team = ALONE,
) -> Step:
    """Loss and gradients by autograd, over chunks whose [token, d_sae] matrices fit the chunk budget.

    Args:
        x: activations, scaled as the weights expect.
        weights: current weights.
        grads: tensors to overwrite with the gradients.
        chunk_loss: gives the loss summed over the chunk's tokens, x - x', and the latents.
        encode_dtype: `bfloat16` runs matrix products in it.
        team: processes that share the batch; `x` is this one's part, the gradients are those of all.
    """
    leaves = type(weights)(*(weight.detach().requires_grad_() for weight in vars(weights).values()))
    for leaf, grad in zip(vars(leaves).values(), vars(grads).values(), strict=True):
        leaf.grad = grad.zero_()
    total, errors, n_all = x.new_zeros(()), [], n_tokens(x, team)
    fired = torch.zeros(len(weights.b_enc), dtype=torch.bool, device=x.device)
    n_active = torch.zeros((), dtype=torch.long, device=x.device)
    for chunk in torch.split(x, chunk_tokens(len(weights.b_enc), x.device)):
        with torch.enable_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=encode_dtype == torch.bfloat16):
            loss, error, latents = chunk_loss(chunk, leaves)
            (loss / n_all).backward()  # type: ignore[no-untyped-call]
        total += loss.detach() / n_all
        errors.append(error.detach().to(x.dtype))
        active = latents.detach() > 0
        fired |= active.any(0)
        n_active += active.sum()
    for grad in vars(grads).values():
        team.over_tokens(grad)
    fired = team.over_tokens(fired.int()) > 0
    return Step(team.over_tokens(total), torch.cat(errors), fired, team.over_tokens(n_active), n_all)
