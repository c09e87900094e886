"""Passes that take up from recorded layers: bit for bit what whole passes give, and less work."""

import pytest
import torch
from tiny_sae import make_sae, with_random_adapter

from saetools.data import ForcedChoiceItem
from saetools.errors import InputError
from saetools.evaluate import measure_perplexity, score_forced_choice
from saetools.models import LayerReplay, Site, load_model
from saetools.steer import add_direction, clamp

ITEMS = [
    ForcedChoiceItem("1", "a", "Hi", "Hello there, friend.", "Go away."),
    ForcedChoiceItem("2", "b", "What should I do with the money that I found?", "Bring it back.", "Spend it all."),
    ForcedChoiceItem("3", "a", "Lie?", "No.", "Yes, whenever it helps you."),
]
TEXTS = ["The cat sat on the mat.", "Rain.", "An old house by the sea, and nobody in it."]
PUSH = add_direction(torch.randn(32, generator=torch.Generator().manual_seed(2)), 1.0)


def runs_of(lm, layer):
    """Counts the times that a module inside a layer is run."""
    count = []
    next(iter(lm.layers[layer].children())).register_forward_hook(lambda *_: count.append(1))
    return count


def assert_replays(lm, site):
    replay = LayerReplay(lm, site)
    for edits in ({}, {site: PUSH}, {site: [PUSH, clamp(make_sae(), [3, 4], 3.0).on("response")]}):
        for batch_rows in (2, 24):
            ours = score_forced_choice(lm, ITEMS, edits=edits, batch_rows=batch_rows, replay=replay)
            assert torch.equal(ours.gaps, score_forced_choice(lm, ITEMS, edits=edits, batch_rows=batch_rows).gaps)
        if "response" not in repr(edits):
            ours = measure_perplexity(lm, TEXTS, edits=edits, batch_tokens=64, replay=replay)
            assert ours == measure_perplexity(lm, TEXTS, edits=edits, batch_tokens=64)


def test_replayed_scores_are_those_of_whole_passes(family_lm):
    assert_replays(family_lm, Site(1))


SITES = [Site(0, "resid_pre"), Site(0), Site(1, "resid_pre"), Site(1, "mlp_out"), Site(2)]


@pytest.mark.parametrize("site", SITES, ids=str)
def test_replays_start_at_any_site(make_tiny, site):
    assert_replays(make_tiny("llama"), site)


def test_layers_below_the_site_are_run_once(make_tiny):
    lm = make_tiny("llama")
    replay = LayerReplay(lm, Site(1))
    below, at, above = (runs_of(lm, layer) for layer in range(3))
    for _ in range(3):
        score_forced_choice(lm, ITEMS, edits={Site(1): PUSH}, replay=replay)
    assert (len(below), len(at), len(above)) == (2, 2, 6)  # questions and answers
    score_forced_choice(lm, ITEMS[:2], replay=replay)  # other tokens
    assert (len(below), len(at), len(above)) == (4, 4, 8)
    measure_perplexity(lm, TEXTS)  # whole again
    assert (len(below), len(at), len(above)) == (5, 5, 9)


def test_the_built_in_model_is_scored_alike(smollm):
    push = add_direction(20 * torch.nn.functional.normalize(torch.ones(576), dim=0), 1.0)
    replay = LayerReplay(smollm, Site(17))
    for edits in ({}, {Site(17): push}, {Site(20): push}):
        ours = score_forced_choice(smollm, ITEMS[:2], edits=edits, replay=replay)
        assert torch.equal(ours.gaps, score_forced_choice(smollm, ITEMS[:2], edits=edits).gaps)


def test_adapters_do_not_see_each_others_layers(make_tiny):
    tuned = with_random_adapter(make_tiny("llama"))
    replay = LayerReplay(tuned, Site(1))
    for lm in (tuned, tuned.base, tuned):
        ours = score_forced_choice(lm, ITEMS, replay=replay)
        assert torch.equal(ours.gaps, score_forced_choice(lm, ITEMS).gaps)


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
def test_transformer_lens_models(make_tiny):
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.model_bridge import TransformerBridge

    tiny = make_tiny("gpt2")
    shape = {"d_model": 32, "n_layers": 3, "n_heads": 4, "d_head": 8, "n_ctx": 128, "d_vocab": len(tiny.tokenizer)}
    config = HookedTransformerConfig(**shape, d_mlp=128, act_fn="gelu_new", normalization_type="LN", device="cpu")
    hooked = HookedTransformer(config, tokenizer=tiny.tokenizer)
    source = make_tiny("llama")
    bridge = TransformerBridge.boot_transformers("x/llama", hf_model=source.model, tokenizer=source.tokenizer)
    for lm in (load_model(hooked), load_model(bridge)):
        replay = LayerReplay(lm, Site(1))
        for edits in ({}, {Site(1): PUSH}, {Site(1): PUSH}):
            ours = score_forced_choice(lm, ITEMS, edits=edits, replay=replay)
            assert torch.equal(ours.gaps, score_forced_choice(lm, ITEMS, edits=edits).gaps)


def test_layers_are_whole_again_after_an_exception(make_tiny):
    lm = make_tiny("llama")
    replay = LayerReplay(lm, Site(1))
    before = score_forced_choice(lm, ITEMS, replay=replay).gaps

    def fails(acts, where):
        raise RuntimeError

    for known in (replay, LayerReplay(lm, Site(1))):
        with pytest.raises(RuntimeError):
            score_forced_choice(lm, ITEMS, edits={Site(1): fails}, replay=known)
        assert all("forward" not in vars(layer) for layer in lm.layers)
    assert torch.equal(score_forced_choice(lm, ITEMS).gaps, before)


def test_edits_of_layers_that_are_not_run_are_errors(make_tiny):
    lm = make_tiny("llama")
    replay = LayerReplay(lm, Site(1))
    for measure, given in ((score_forced_choice, ITEMS), (measure_perplexity, TEXTS)):
        with pytest.raises(InputError, match=r"edits: expected edits at blocks.1.hook_resid_post or after it.*mlp_out"):
            measure(lm, given, edits={Site(1): PUSH, Site(1, "mlp_out"): PUSH}, replay=replay)
    with pytest.raises(InputError, match="site: expected a layer below 3"):
        LayerReplay(lm, Site(3))
