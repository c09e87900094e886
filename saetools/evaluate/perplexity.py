"""Perplexity on reference texts: how much of the model's skill an edit leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from saetools.data.conversation import Conversation
from saetools.data.tokenizing import make_batches, tokenize
from saetools.errors import InputError
from saetools.models.editing import Edits, edit
from saetools.models.forward import token_log_probs
from saetools.models.language_model import LanguageModel
from saetools.models.replay import LayerReplay
from saetools.models.site import FIRST_SITE


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-probability per token.

    Args:
        value: the perplexity.
        n_tokens: tokens that were predicted.
    """

    value: float
    n_tokens: int


@torch.inference_mode()
def measure_perplexity(
    lm: LanguageModel,
    texts: Sequence[str],
    *,
    edits: Edits | None = None,
    batch_tokens: int = 4096,
    replay: LayerReplay | None = None,
) -> Perplexity:
    """Perplexity of a model on plain texts, each by itself, without its first token; under edits if any.

    Args:
        lm: the model.
        texts: the texts.
        edits: edits per site.
        batch_tokens: padded tokens of a forward pass.
        replay: what layers below the edits computed before, to measure the same texts under many edits.

    Raises:
        InputError: if no text has two tokens, or if an edit lies below the replay's site.
    """
    if isinstance(texts, str):
        raise InputError("texts", expected="a list of texts", received="a string", remedy="pass [text]")
    replay = replay or LayerReplay(lm, FIRST_SITE)
    replay.check(edits or {})
    tokenized = list(tokenize((Conversation(text=text) for text in texts), lm.tokenizer))
    total, n_tokens = 0.0, 0
    with lm.active():
        for batch in make_batches(tokenized, batch_tokens=batch_tokens):
            scored = batch.counted()
            with edit(lm, edits or {}, roles=batch.roles), replay.over(lm, batch.token_ids, batch.mask):
                values = token_log_probs(
                    lm, batch.token_ids.to(lm.device), batch.mask.to(lm.device), scored.to(lm.device)
                )
            total += float(values.double().sum())
            n_tokens += len(values)
    if not n_tokens:
        raise InputError("texts", expected="texts of two tokens or more", received="none", remedy="pass longer texts")
    return Perplexity(math.exp(-total / n_tokens), n_tokens)
