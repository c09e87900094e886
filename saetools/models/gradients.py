"""Gradients of an answer's loss at a site of the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.data.roles import select_positions
from saetools.data.tokenizing import Batch
from saetools.models.editing import edit
from saetools.models.forward import final_hidden, log_probs
from saetools.models.language_model import LanguageModel
from saetools.models.site import Site

_HEAD_CHUNK = 256  # tokens whose logits, and their gradients, exist at the same time


def residual_gradients(
    lm: LanguageModel, site: Site, batch: Batch
) -> tuple[Float[Tensor, "row pos d_model"], Float[Tensor, "row pos d_model"]]:
    """The residual stream at a site, and the gradient there of each row's loss.

    A row's loss is the mean cross-entropy of its assistant tokens, in nats; a row without any has gradient 0. Layers
    below the site keep nothing for the backward pass, and parameters get no gradients.

    Args:
        lm: the model.
        site: where.
        batch: conversations with answers, padded on the right.

    Returns:
        Activations and gradients, on the device and in the dtype of the layer.

    Raises:
        InputError: if the site does not exist in this model.
    """
    found: list[Tensor] = []

    def cut(acts: Tensor, _where: Any) -> Tensor:
        torch.set_grad_enabled(True)  # from here on; `no_grad` below ends it
        found.append(acts.detach().clone().requires_grad_())
        return found[0]

    scored = select_positions(batch.roles, "response") & batch.counted()
    weights = (scored / scored.sum(1, keepdim=True))[scored]
    token_ids, mask = batch.token_ids.to(lm.device), batch.mask.to(lm.device)
    with torch.no_grad(), edit(lm, {site: cut}):
        hidden = final_hidden(lm, token_ids, mask)
        states = hidden[:, :-1][scored[:, 1:].to(hidden.device)]
        above = _head_gradients(lm, states.detach(), batch.token_ids[scored].to(hidden.device), weights)
        (grads,) = torch.autograd.grad(states, found[0], above)
    return found[0].detach(), grads


def _head_gradients(
    lm: LanguageModel,
    states: Float[Tensor, "token d_model"],
    targets: Int[Tensor, " token"],
    weights: Float[Tensor, " token"],
) -> Float[Tensor, "token d_model"]:
    """Of the weighted loss at the final hidden states; logits of all of them never exist at the same time."""
    grads = torch.empty_like(states)
    for start in range(0, len(states), _HEAD_CHUNK):
        part = slice(start, start + _HEAD_CHUNK)
        some = states[part].requires_grad_()
        loss = -(log_probs(lm, some, targets[part]) * weights[part].to(states.device)).sum()
        grads[part] = torch.autograd.grad(loss, some)[0]
    return grads
