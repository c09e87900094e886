"""Streamed activations are those of reading conversation by conversation."""

from __future__ import annotations

import pytest
import torch

from saetools.activations import stream_activations
from saetools.data import Conversation, Role, TokenizedConversation, tokenize
from saetools.errors import NonFiniteError
from saetools.models import LanguageModel, Site, edit, read

SITES = [Site(0), Site(1, "mlp_out")]


@pytest.mark.parametrize("skip_first", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_every_token_comes_once_as_if_read_alone(
    tiny_lm: LanguageModel, tokenized: list[TokenizedConversation], skip_first: bool, batch_tokens: int
):
    blocks = list(stream_activations(tiny_lm, SITES, tokenized, batch_tokens=batch_tokens, skip_first=skip_first))
    assert sum(map(len, blocks)) == sum(len(one) - skip_first for one in tokenized)
    for number, one in enumerate(tokenized):
        found = [(block, block.documents == number) for block in blocks if bool((block.documents == number).any())]
        if len(one) == skip_first:
            assert not found
            continue
        ((block, rows),) = found  # a conversation comes whole
        with torch.no_grad():
            alone = read(tiny_lm, one.token_ids[None], torch.ones(1, len(one), dtype=torch.bool), SITES)
        assert torch.equal(block.positions[rows], torch.arange(skip_first, len(one)))
        assert torch.equal(block.token_ids[rows], one.token_ids[skip_first:])
        assert torch.equal(block.roles[rows], one.roles[skip_first:])
        for site in SITES:
            torch.testing.assert_close(block.acts[site][rows], alone[site][0, skip_first:], rtol=1e-5, atol=1e-5)


def test_activations_can_be_used_with_gradients(tiny_lm: LanguageModel, tokenized: list[TokenizedConversation]):
    block = next(stream_activations(tiny_lm, SITES, tokenized))
    acts = block.acts[Site(0)]
    assert not acts.requires_grad
    probe = torch.nn.Linear(acts.shape[1], 1)
    probe(acts).sum().backward()
    assert probe.weight.grad is not None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_name_the_conversation(
    tiny_lm: LanguageModel, tokenized: list[TokenizedConversation], bad: float
):
    marked = int(tokenized[5].token_ids[-2])
    here = [one for one in tokenized if marked in one.token_ids[1:].tolist()]

    def spoil(acts: torch.Tensor, where: object) -> torch.Tensor:
        return torch.where((where.token_ids == marked)[..., None], bad, acts)

    names = "|".join(one.id for one in here)
    with (
        edit(tiny_lm, {Site(0): spoil}),
        pytest.raises(NonFiniteError, match=rf"not finite in conversation '({names})'"),
    ):
        list(stream_activations(tiny_lm, [Site(0)], tokenized))


def test_huge_but_finite_activations_pass(tiny_lm: LanguageModel, tokenized: list[TokenizedConversation]):
    with edit(tiny_lm, {Site(0): lambda acts, where: torch.full_like(acts, 3e38)}):  # their sum is infinite
        blocks = list(stream_activations(tiny_lm, [Site(0)], tokenized))
    assert sum(map(len, blocks)) == sum(len(one) - 1 for one in tokenized)


def test_the_real_model_without_its_first_positions(smollm: LanguageModel):
    texts = [
        "The capital of France is Paris, a city on the Seine.",
        "Two plus two is four, and four plus four is eight.",
    ]
    conversations = [Conversation(text=text) for text in texts]
    conversations.append(Conversation.chat("How do I check the oil?", "Pull out the dipstick.", id="chat"))
    tokens = list(tokenize(conversations, smollm.tokenizer))
    site = Site(15)
    (kept,) = stream_activations(smollm, [site], tokens)
    (everything,) = stream_activations(smollm, [site], tokens, skip_first=False)
    norms, first = everything.acts[site].norm(dim=1), everything.positions == 0
    assert kept.acts[site].shape == (sum(map(len, tokens)) - 3, 576)
    assert torch.equal(kept.acts[site], everything.acts[site][~first])
    assert norms[first].min() > 20 * norms[~first].median()  # attention sinks
    assert 80 < norms[~first].median() < 400
    chat = kept.roles[kept.documents == 2]
    assert int(((chat & int(Role.RESPONSE)) > 0).sum()) == len(smollm.tokenizer("Pull out the dipstick.").input_ids)
