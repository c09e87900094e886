"""Perplexity and fidelity against computations by hand, and SAEs whose fidelity is known."""

import math

import pytest
import torch
from tiny_sae import basis_sae, make_sae, with_random_adapter

from saetools.data import Conversation, tokenize
from saetools.errors import InputError
from saetools.evaluate import measure_fidelity, measure_perplexity, splice
from saetools.models import Site, edit, read
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


def residuals(lm):
    with torch.no_grad():
        return torch.cat(
            [
                read(lm, one.token_ids[None], torch.ones(1, len(one), dtype=torch.bool), [SITE])[SITE][0, 1:]
                for one in tokenize(CONVERSATIONS, lm.tokenizer)
            ]
        )


@pytest.mark.parametrize("edits", [{}, {SITE: add_direction(V, 1.0)}, {SITE: add_direction(V, 1.0, tokens="prompt")}])
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


def test_an_sae_that_keeps_everything(lm):
    fidelity = measure_fidelity(lm, basis_sae(signs=(1, -1)), CONVERSATIONS, site=SITE)
    assert fidelity.fvu == pytest.approx(0, abs=1e-9)
    assert fidelity.l0 == pytest.approx(32, abs=0.1)
    assert fidelity.ce_recovered == pytest.approx(1, abs=1e-3)
    assert fidelity.kl == pytest.approx(0, abs=1e-5)


def test_an_sae_that_keeps_nothing(lm):
    sae = make_sae("topk")
    with torch.no_grad():
        sae.b_enc.fill_(-1000.0)
        sae.b_dec.zero_()
    fidelity = measure_fidelity(lm, sae, CONVERSATIONS, site=SITE)
    x = residuals(lm).double()
    assert fidelity.fvu == pytest.approx(float(x.square().sum() / (x - x.mean(0)).square().sum()), rel=1e-4)
    assert (fidelity.l0, fidelity.dead, fidelity.ce_recovered) == (0, 1, pytest.approx(0, abs=1e-6))
    assert fidelity.ce_sae == pytest.approx(fidelity.ce_zero)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_figures_are_those_of_a_dense_computation(lm, kind):
    sae = make_sae(kind)
    done = []
    fidelity = measure_fidelity(lm, sae, CONVERSATIONS, site=SITE, batch_tokens=30, on_progress=done.append)
    x = residuals(lm)
    f = sae.encode(x).to_dense()
    sae.requires_grad_(False)
    error = (x - (f @ sae.W_dec + sae.b_dec)).square().sum(-1)
    variance = (x - x.mean(0)).square().sum(-1)
    explained = 1 - error.mean() / variance.mean()  # SAELens' `explained_variance`
    assert fidelity.fvu == pytest.approx(1 - float(explained), rel=1e-4)
    assert fidelity.l0 == pytest.approx(float((f > 0).sum(1).float().mean()))
    assert fidelity.dead == pytest.approx(float((f == 0).all(0).float().mean()))
    assert fidelity.n_tokens == fidelity.n_predictions == len(x) == done[-1]
    assert fidelity.ce_clean == pytest.approx(mean_nll(lm, CONVERSATIONS, {})[0], rel=1e-5)
    assert fidelity.ce_sae == pytest.approx(mean_nll(lm, CONVERSATIONS, {SITE: splice(sae)})[0], rel=1e-5)
    zeroed = {SITE: lambda acts, where: torch.where((where.positions > 0)[..., None], 0.0, acts)}
    assert fidelity.ce_zero == pytest.approx(mean_nll(lm, CONVERSATIONS, zeroed)[0], rel=1e-5)
    recovered = (fidelity.ce_zero - fidelity.ce_sae) / (fidelity.ce_zero - fidelity.ce_clean)
    assert fidelity.ce_recovered == pytest.approx(recovered)
    assert fidelity.kl > 0


def test_fidelity_needs_tokens(lm):
    with pytest.raises(InputError, match="conversations: expected tokens to predict"):
        measure_fidelity(lm, make_sae(), [Conversation(text="a")], site=SITE)
