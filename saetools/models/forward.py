"""Running a model: residual streams, final hidden states, and log-probabilities of chosen tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saetools.errors import InputError
from saetools.models.editing import attach
from saetools.models.language_model import LanguageModel
from saetools.models.layout import is_hooked_transformer, locate
from saetools.models.site import Site

_HEAD_CHUNK = 512  # tokens whose logits exist at the same time


class _Stop(Exception):  # noqa: N818 - a signal, not an error
    """Unwinds a forward pass from a hook once everything asked for is known."""


def read(
    lm: LanguageModel,
    token_ids: Int[Tensor, "row pos"],
    mask: Bool[Tensor, "row pos"],
    sites: Iterable[Site],
) -> dict[Site, Float[Tensor, "row pos d_model"]]:
    """The residual stream at some sites; layers after the last of them are not run.

    Inside an `edit` block the values are those after the edits. Gradients flow if they are enabled.

    Args:
        lm: the model.
        token_ids: token ids, padded on either side.
        mask: `False` at padding.
        sites: where to read.

    Returns:
        Activations per site, on the device and in the dtype of their layer.

    Raises:
        InputError: if a site does not exist in this model.
    """
    wanted = sorted(set(sites))
    if not wanted:
        raise InputError("sites", expected="at least one site", received="none", remedy="name where to read")
    found: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[[Tensor], None]:
        def hook(acts: Tensor) -> None:
            found[site] = acts
            if len(found) == len(wanted):
                raise _Stop

        return hook

    with ExitStack() as hooks:
        for site in wanted:
            hooks.callback(attach(*locate(lm.model, lm.layout, site), keep(site)).remove)
        _run_until_stopped(lm, token_ids, mask, cache=None)
    return found


def final_hidden(
    lm: LanguageModel,
    token_ids: Int[Tensor, "row pos"],
    mask: Bool[Tensor, "row past_and_pos"],
    *,
    cache: Any = None,
) -> Float[Tensor, "row pos d_model"]:
    """The normalised residual that the head would turn into logits.

    Args:
        lm: the model.
        token_ids: new token ids.
        mask: `False` at padding, for cached and new tokens.
        cache: a Hugging Face cache to continue, which is extended; `None` starts afresh.
    """
    found: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise _Stop

    handle = lm.head.register_forward_pre_hook(hook)
    try:
        _run_until_stopped(lm, token_ids, mask, cache=cache)
    finally:
        handle.remove()
    return found[0]


def logits(lm: LanguageModel, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
    """Logits of final hidden states, soft-capped where the architecture does so. Pass only positions you need."""
    with lm.active():
        out: Tensor = lm.head(hidden)
    cap = lm.logit_cap
    return out if cap is None else torch.tanh(out / cap) * cap


def log_probs(
    lm: LanguageModel,
    hidden: Float[Tensor, "token d_model"],
    targets: Int[Tensor, " token"],
) -> Float[Tensor, " token"]:
    """Natural log-probability of one target token after each hidden state, in float32.

    Goes through the head in chunks, so that logits of the whole batch never exist at once (unless gradients are kept).
    """
    parts = [
        torch.log_softmax(logits(lm, some).float(), dim=-1).gather(-1, wanted[:, None])[:, 0]
        for some, wanted in zip(torch.split(hidden, _HEAD_CHUNK), torch.split(targets, _HEAD_CHUNK), strict=True)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def token_log_probs(
    lm: LanguageModel,
    token_ids: Int[Tensor, "row pos"],
    mask: Bool[Tensor, "row pos"],
    scored: Bool[Tensor, "row pos"],
) -> Float[Tensor, " scored"]:
    """Log-probability of every scored token given the tokens before it, row by row, in float32.

    Args:
        lm: the model.
        token_ids: token ids.
        mask: `False` at padding.
        scored: tokens whose probability is wanted; not padding, nor a row's first token.

    Raises:
        InputError: if padding, or a token without a predecessor, is to be scored.
    """
    predicted = torch.nn.functional.pad(mask[:, 1:] & mask[:, :-1], (1, 0))
    if bool((scored & ~predicted).any()):
        raise InputError(
            "scored",
            expected="tokens with a token before them",
            received="padding or a row's first token",
            remedy="leave those out: nothing predicts them",
        )
    hidden = final_hidden(lm, token_ids, mask)
    return log_probs(lm, hidden[:, :-1][scored[:, 1:]], token_ids[scored].to(hidden.device))


def _run_until_stopped(lm: LanguageModel, token_ids: Tensor, mask: Tensor, *, cache: Any) -> None:
    if mask.shape[1] > (lm.n_context or mask.shape[1]):  # padding aside
        lm.check_length(int(mask.sum(1).max()), argument="token_ids")
    try:
        with lm.active() as model:
            if is_hooked_transformer(model):
                if cache is not None:
                    raise InputError(
                        "cache",
                        expected="None for a HookedTransformer",
                        received=type(cache).__name__,
                        remedy="use the Hugging Face model, or a TransformerBridge, for cached passes",
                    )
                model(token_ids, attention_mask=mask.long(), return_type="logits")
                return
            start = mask.shape[1] - token_ids.shape[1]
            position_ids = (mask.long().cumsum(1) - 1).clamp_(min=0)[:, start:]
            model(
                input_ids=token_ids,
                attention_mask=mask.long(),
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
            )
    except _Stop:
        pass
