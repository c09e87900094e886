"""Tokens that a latent's direction promotes."""

import pytest
import torch
from tiny_sae import make_sae

from saetools.errors import InputError
from saetools.interpret import promoted_tokens


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_promoted_tokens_are_those_of_a_logit_lens(make_tiny, family):
    lm, sae = make_tiny(family), make_sae()
    found = promoted_tokens(lm, sae, [5, 2], n_tokens=4)
    with torch.no_grad():
        scores = lm.head(lm.final_norm(sae.W_dec[[5, 2]]))
    for latent, row, tokens in zip((5, 2), scores, found, strict=True):
        order = row.argsort(descending=True)
        assert tokens.latent == latent
        assert tokens.promoted == tuple(lm.tokenizer.decode([token]) for token in order[:4].tolist())
        assert tokens.suppressed == tuple(lm.tokenizer.decode([token]) for token in order.flip(0)[:4].tolist())


def test_an_unembedding_row_promotes_its_token(tiny):
    sae = make_sae()
    token = tiny.tokenizer.convert_tokens_to_ids("Q")
    with torch.no_grad():
        sae.W_dec[9] = tiny.head.weight[token] / tiny.final_norm.weight
    assert promoted_tokens(tiny, sae, [9], n_tokens=1)[0].promoted == ("Q",)


def test_all_tokens_can_be_asked_for_and_only_those_that_exist(tiny):
    n = len(tiny.tokenizer)
    (tokens,) = promoted_tokens(tiny, make_sae(), [0], n_tokens=n + 5)
    assert len(tokens.promoted) == len(tokens.suppressed) == n
    with pytest.raises(InputError, match=r"latents: expected 0 to 47, received \[48\]"):
        promoted_tokens(tiny, make_sae(), [0, 48])
