"""Direct effects on chosen tokens, beside the model's own forward pass."""

import pytest
import torch
from tiny_sae import make_sae

import saetools
from saetools.data import Conversation, tokenize
from saetools.errors import InputError
from saetools.interpret import direct_effects, final_residuals
from saetools.models import Site, edit


def read_tokens(lm, *texts):
    return list(tokenize([Conversation(text=text) for text in texts], lm.tokenizer))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_neox_parallel"])
@pytest.mark.parametrize("unit", ["activation", "median_norm"])
def test_effects_are_those_of_the_model_with_the_latent_added_at_its_end(make_tiny, family, unit):
    lm, sae = make_tiny(family), make_sae()
    conversations = read_tokens(lm, "the quick brown fox", "moths")
    residuals = final_residuals(lm, conversations, n=1000)
    effects = direct_effects(lm, sae, [5, 2], ["Q", "th", 7], residuals, amount=0.7, unit=unit)
    row = sae.W_dec if unit == "activation" else 2.5 * torch.nn.functional.normalize(sae.W_dec, dim=1)
    ids = [lm.tokenizer.convert_tokens_to_ids(token) for token in ("Q", "th")] + [7]

    def scores(latent):
        found = []
        for one in conversations:
            add = (lambda acts, _: acts + 0.7 * row[latent]) if latent is not None else (lambda acts, _: acts)
            with torch.no_grad(), edit(lm, {Site(lm.n_layers - 1): add}):
                logits = lm.model(input_ids=one.token_ids[None]).logits[0, 1:]
            found.append(torch.stack([logits[:, ids], logits.log_softmax(-1)[:, ids]]))
        return torch.cat(found, dim=1)

    for place, latent in enumerate((5, 2)):
        change = scores(latent) - scores(None)
        assert torch.allclose(effects.logits[place], change[0].mean(0), atol=1e-5)
        assert torch.allclose(effects.log_probs[place], change[1].mean(0), atol=1e-5)
        assert torch.allclose(effects.spread[place], change[1].std(0, correction=0), atol=1e-5)
    assert effects.n == sum(len(one) - 1 for one in conversations)
    assert (effects.latents, effects.token_ids) == ((5, 2), tuple(ids))
    assert effects.tokens[:2] == ("Q", "th")


def test_small_amounts_give_the_derivative(tiny):
    sae = make_sae()
    residuals = final_residuals(tiny, read_tokens(tiny, "the quick brown fox"))
    up, down = (direct_effects(tiny, sae, [3], ["Q", "x"], residuals, amount=amount) for amount in (0.02, -0.02))
    ids = list(up.token_ids)

    x = residuals.clone().requires_grad_()
    means = tiny.head(tiny.final_norm(x)).log_softmax(-1)[:, ids].mean(0)
    slopes = [torch.autograd.grad(mean, x, retain_graph=True)[0].sum(0) @ sae.W_dec[3] for mean in means]
    assert torch.allclose((up.log_probs - down.log_probs)[0] / 0.04, torch.stack(slopes), rtol=0.01, atol=1e-3)


def test_nothing_added_changes_nothing(tiny):
    residuals = final_residuals(tiny, read_tokens(tiny, "the quick brown fox"))
    effects = direct_effects(tiny, make_sae(), [3], ["Q"], residuals, amount=0.0)
    assert (effects.logits, effects.log_probs, effects.spread) == (0, 0, 0)


def test_louder_residuals_are_moved_less(smollm):
    """What the logit lens cannot know: the same latent beside residuals of ten times the norm."""
    sae = saetools.load_sae(saetools.shipped_path("sae/smollm2-135m"))
    residuals = final_residuals(
        smollm, read_tokens(smollm, "Paris is the capital of France, and Rome that of Italy."), n=8
    )
    top = saetools.promoted_tokens(smollm, sae, [6400], n_tokens=1)[0].promoted[0]
    near, far = (
        direct_effects(smollm, sae, [6400], [top], scale * residuals, amount=0.1, unit="median_norm").logits.item()
        for scale in (1, 10)
    )
    assert near > 3 * far > 0


def test_residuals_are_chosen_by_seed(tiny):
    conversations = read_tokens(tiny, "the quick brown fox jumps")
    first, again, other = (final_residuals(tiny, conversations, n=5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first) == 5


def test_what_cannot_be_measured_is_refused(tiny):
    residuals = final_residuals(tiny, read_tokens(tiny, "the quick brown fox"))
    good = {"latents": [1], "tokens": ["Q"], "residuals": residuals}
    for bad, match in (
        ({"latents": [48]}, r"latents: expected 0 to 47, received \[48\]"),
        ({"tokens": ["Qx"]}, r"tokens: expected texts of one token each, received 'Qx', which is \['Q', 'x'\]"),
        ({"tokens": [10**6]}, "tokens: expected ids"),
        ({"residuals": residuals[:0]}, "residuals: expected one or more"),
    ):
        with pytest.raises(InputError, match=match):
            direct_effects(tiny, make_sae(), **(good | bad))
    with pytest.raises(InputError, match="unit: expected an SAE that knows the median norm"):
        direct_effects(tiny, make_sae(median_norm=None), [1], ["Q"], residuals, unit="median_norm")
    sae = make_sae()
    sae.input_norm = "layer_norm"
    with pytest.raises(InputError, match="unit: expected median_norm, for an SAE whose activations have no fixed size"):
        direct_effects(tiny, sae, [1], ["Q"], residuals)
