"""Perplexity against the model's own logits."""

import math

import pytest
import torch
from tiny_sae import with_random_adapter

from saetools.data import Conversation, tokenize
from saetools.errors import InputError
from saetools.evaluate import measure_perplexity
from saetools.models import Site, edit
from saetools.steer import add_direction

SITE = Site(1)
TEXTS = ["The cat sat on the mat.", "Rain.", "An old house by the sea, and nobody in it."]
CONVERSATIONS = [*(Conversation(text=text) for text in TEXTS), Conversation.chat("Hi", "Hello there.")]
V = torch.randn(32, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def lm(make_tiny):
    return make_tiny("llama")


def mean_nll(lm, conversations, edits):
    """From the model's own logits, one by one."""
    losses = []
    for one in tokenize(conversations, lm.tokenizer):
        with torch.no_grad(), lm.active(), edit(lm, edits, roles=one.roles[None]):
            scores = lm.model(one.token_ids[None]).logits[0].log_softmax(-1)
        losses.append(-scores[:-1].gather(1, one.token_ids[1:, None])[:, 0])
    return float(torch.cat(losses).mean()), sum(map(len, losses))


@pytest.mark.parametrize("edits", [{}, {SITE: add_direction(V, 1.0)}, {SITE: add_direction(V, 1.0).on("prompt")}])
def test_perplexity_is_that_of_the_logits(lm, edits):
    expected, n = mean_nll(lm, CONVERSATIONS[:3], edits)
    for batch_tokens in (4096, 1):
        ours = measure_perplexity(lm, TEXTS, edits=edits, batch_tokens=batch_tokens)
        assert (ours.value, ours.n_tokens) == (pytest.approx(math.exp(expected), rel=1e-5), n)


def test_perplexity_is_that_of_the_view(make_tiny, lm):
    tuned = with_random_adapter(make_tiny("llama"))
    assert measure_perplexity(tuned.base, TEXTS) == measure_perplexity(lm, TEXTS)
    assert measure_perplexity(tuned, TEXTS).value != pytest.approx(measure_perplexity(lm, TEXTS).value, rel=1e-3)


@pytest.mark.parametrize("texts", [[], ["a"]])
def test_perplexity_needs_tokens(lm, texts):
    with pytest.raises(InputError, match="texts: expected texts of two tokens or more"):
        measure_perplexity(lm, texts)
