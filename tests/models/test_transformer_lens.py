"""The same sites and edits on TransformerLens models: residuals and logits agree with Hugging Face."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from saetools.errors import InputError
from saetools.models import STREAMS, Site, edit, final_hidden, load_model, logits, read, token_log_probs

IDS = torch.tensor([[5, 6, 7, 8, 9], [257, 257, 10, 11, 12]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
V = torch.randn(32, generator=torch.Generator().manual_seed(2))


pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def steer(acts, where):
    return torch.where((where.positions > 0)[..., None], 1.2 * acts + V, acts)


def sites_of(family):
    streams = [stream for stream in STREAMS if not (family == "gpt_neox_parallel" and stream == "resid_mid")]
    return [Site(layer, stream) for layer in range(3) for stream in streams]


def boot(lm):
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        f"x/{lm.model.config.model_type}", hf_model=lm.model, tokenizer=lm.tokenizer
    )


def hooked_of(lm, family, **settings):
    """A `HookedTransformer` with the weights of a Hugging Face model, without any processing."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions

    shape = {"d_model": 32, "n_layers": 3, "n_heads": 4, "d_head": 8, "n_ctx": 128, "d_vocab": len(lm.tokenizer)}
    rotary = {"positional_embedding_type": "rotary", "rotary_adjacent_pairs": False, "d_mlp": 48}
    family_settings = {
        "llama": {**rotary, "rotary_dim": 8, "n_key_value_heads": 2, "act_fn": "silu", "gated_mlp": True}
        | {"normalization_type": "RMS", "final_rms": True, "eps": 1e-6},
        "gpt2": {"act_fn": "gelu_new", "normalization_type": "LN", "d_mlp": 128},
        "gpt_neox_parallel": {**rotary, "rotary_dim": 2, "act_fn": "gelu", "normalization_type": "LN"}
        | {"parallel_attn_mlp": True},
    }
    config = HookedTransformerConfig(**shape, **family_settings[family], device="cpu", **settings)
    convert = {"llama": "llama", "gpt2": "gpt2", "gpt_neox_parallel": "neox"}[family]
    model = HookedTransformer(config, tokenizer=lm.tokenizer)
    model.load_and_process_state_dict(
        getattr(weight_conversions, f"convert_{convert}_weights")(lm.model, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model


def assert_equal_runs(lm, other, family, call):
    """Residuals and logits of two models, plain and under edits at all streams of a layer at once."""
    sites = sites_of(family)
    layer = {site: steer for site in sites if site.layer == 1}
    for edits in ({}, layer, {Site(2): steer}):
        with edit(lm, edits):
            expected = read(lm, IDS, MASK, sites)
            expected_logits = logits(lm, final_hidden(lm, IDS, MASK))
        with edit(other, edits):
            found = read(other, IDS, MASK, sites)
            found_logits = logits(other, final_hidden(other, IDS, MASK))
            with other.active():
                called = call(IDS, attention_mask=MASK.long())
        for site in sites:
            torch.testing.assert_close(found[site][MASK], expected[site][MASK], rtol=1e-5, atol=1e-5)
        for values in (found_logits, called):
            torch.testing.assert_close(values[MASK], expected_logits[MASK], rtol=1e-5, atol=1e-5)
    assert (expected_logits - logits(lm, final_hidden(lm, IDS, MASK))).abs().max() > 0.1


BRIDGED = ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "gpt_neox_parallel"]


@pytest.mark.parametrize("family", BRIDGED)
def test_a_bridge_agrees_with_hugging_face(make_tiny, family):
    bridge = boot(make_tiny(family))
    lm = load_model(bridge)
    assert (lm.d_model, lm.n_layers, len(lm.tokenizer)) == (32, 3, 260)
    assert_equal_runs(make_tiny(family), lm, family, bridge)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox_parallel"])
def test_a_hooked_transformer_agrees_with_hugging_face(make_tiny, family):
    plain = make_tiny(family)
    hooked = hooked_of(plain, family)
    lm = load_model(hooked)
    assert (lm.d_model, lm.n_layers, len(lm.tokenizer)) == (32, 3, 260)
    assert_equal_runs(plain, lm, family, hooked)
    scored = MASK & (MASK.cumsum(1) > 1)
    torch.testing.assert_close(token_log_probs(lm, IDS, MASK, scored), token_log_probs(plain, IDS, MASK, scored))
    if family == "gpt_neox_parallel":
        with pytest.raises(InputError, match="HookedTransformer with parallel"):
            read(lm, IDS, MASK, [Site(0, "resid_mid")])


def test_a_bridge_agrees_with_adapters_injected(make_tiny):
    def with_adapter():
        torch.manual_seed(0)
        lm = make_tiny("llama")
        config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj", "down_proj"])
        return load_model(get_peft_model(lm.model, config), tokenizer=lm.tokenizer)

    plain = with_adapter()
    bridge = boot(with_adapter())
    lm = load_model(bridge)
    assert lm.adapter == plain.adapter == "default"
    assert_equal_runs(plain, lm, "llama", bridge)
    assert_equal_runs(plain.base, lm.base, "llama", bridge)
    last = Site(2)
    assert (read(lm, IDS, MASK, [last])[last] - read(lm.base, IDS, MASK, [last])[last]).abs().max() > 0.1


@pytest.mark.parametrize("use_cache", [True, False])
def test_edits_follow_generation_on_transformer_lens_models(make_tiny, use_cache):
    plain = make_tiny("gpt2")
    hooked = hooked_of(plain, "gpt2")
    bridge = boot(make_tiny("gpt2"))
    settings = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}
    edits = {Site(1): lambda acts, where: acts + V * (where.positions % 2 == 1)[..., None]}
    ids = IDS[:1]
    with edit(plain, edits):
        expected = plain.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4)
    assert not torch.equal(expected, plain.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4))
    for model in (hooked, bridge):
        with edit(load_model(model), edits):
            assert torch.equal(model.generate(ids, use_past_kv_cache=use_cache, **settings), expected)


def test_a_hooked_transformer_tells_which_tokens_an_edit_sees(make_tiny):
    hooked = hooked_of(make_tiny("gpt2"), "gpt2")
    hooked.tokenizer.padding_side = "left"
    seen = []

    def record(acts, where):
        seen.append(where)
        return acts

    with edit(load_model(hooked), {Site(0, "resid_pre"): record}):
        hooked(IDS)  # without a mask: TransformerLens looks for padding itself
        hooked(hooked.embed.W_E[IDS], start_at_layer=0)
        hooked.run_with_cache(IDS, attention_mask=MASK.long())
    assert seen[0].positions.tolist() == [[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]]
    assert [where.token_ids is None for where in seen] == [False, True, False]
    assert torch.equal(seen[2].token_ids, IDS)
    assert torch.equal(seen[2].mask, MASK)


def test_a_hooked_transformer_caps_its_logits(make_tiny):
    hooked = hooked_of(make_tiny("llama"), "llama", output_logits_soft_cap=0.5)
    lm = load_model(hooked)
    capped = logits(lm, final_hidden(lm, IDS, MASK))
    torch.testing.assert_close(capped, hooked(IDS, attention_mask=MASK.long()))
    assert 0.4 < capped.abs().max() <= 0.5


def test_a_hooked_transformer_has_no_hugging_face_cache(make_tiny):
    from transformers import DynamicCache

    lm = load_model(hooked_of(make_tiny("gpt2"), "gpt2"))
    with pytest.raises(InputError, match="cache: expected None for a HookedTransformer"):
        final_hidden(lm, IDS, MASK, cache=DynamicCache())
