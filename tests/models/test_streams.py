"""Reading and editing every stream of every family, against what the Hugging Face modules give by hand."""

import pytest
import torch

from saetools.errors import InputError
from saetools.models import STREAMS, Site, edit, final_hidden, logits, read
from saetools.models.layout import layout_of

LAYER = 1
IDS = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(2, 9, dtype=torch.bool)
V = torch.randn(32, generator=torch.Generator().manual_seed(2))

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def run(lm):
    return lm.model(IDS, attention_mask=MASK.long()).logits


def is_parallel(lm):
    return getattr(lm.model.config, "use_parallel_residual", False)


def mlp_by_hand(lm, layer, x):
    """What a layer's MLP adds to the residual stream when its norm sees `x`."""
    block = lm.layers[layer]
    match lm.model.config.model_type:
        case "gemma2" | "gemma3" | "gemma3_text":
            return block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x)))
        case "gpt2":
            return block.mlp(block.ln_2(x))
        case _:
            return block.mlp(block.post_attention_layernorm(x))


def plus_v(acts, where):
    return acts + V


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def n_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_reads_what_hugging_face_and_the_modules_give(family_lm, family_sites):
    acts = read(family_lm, IDS, MASK, family_sites)
    assert list(acts) == family_sites
    hidden = family_lm.model(IDS, attention_mask=MASK.long(), output_hidden_states=True).hidden_states
    for layer in range(family_lm.n_layers):
        pre, attn, mlp, post = (
            acts[Site(layer, stream)] for stream in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        close(pre, hidden[layer])
        if layer + 1 < family_lm.n_layers:
            close(post, hidden[layer + 1])
            assert torch.equal(post, acts[Site(layer + 1, "resid_pre")])
        if is_parallel(family_lm):
            close(mlp, mlp_by_hand(family_lm, layer, pre))
        else:
            mid = acts[Site(layer, "resid_mid")]
            close(mlp, mlp_by_hand(family_lm, layer, mid))
            close(mid, pre + attn)
        close(post, pre + attn + mlp)
    close(family_lm.final_norm(post), final_hidden(family_lm, IDS, MASK))
    close(logits(family_lm, final_hidden(family_lm, IDS, MASK)), run(family_lm))


def test_reading_stops_after_the_last_site(family_lm):
    called = []
    modules = {"mlp 1": family_lm.layers[1].mlp, "layer 2": family_lm.layers[2], "head": family_lm.head}
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.append(name)) for name, module in modules.items()
    ]
    counts = n_hooks(family_lm.model)
    read(family_lm, IDS, MASK, [Site(1, "resid_pre"), Site(0)])
    assert called == []
    read(family_lm, IDS, MASK, [Site(1)])
    assert called == ["mlp 1"]
    final_hidden(family_lm, IDS, MASK)
    assert called == ["mlp 1", "mlp 1", "layer 2"]
    assert n_hooks(family_lm.model) == counts
    for hook in hooks:
        hook.remove()


def test_an_edit_that_changes_nothing_gives_the_same_bits(family_lm, family_sites):
    plain = run(family_lm)
    with edit(family_lm, {site: lambda acts, where: acts.clone() for site in family_sites}):
        assert torch.equal(run(family_lm), plain)
    assert torch.equal(run(family_lm), plain)


@pytest.mark.parametrize("stream", STREAMS)
def test_an_added_constant_gives_what_it_gives_by_hand(family_lm, family_sites, stream):
    if Site(LAYER, stream) not in family_sites:
        with pytest.raises(InputError, match=r"blocks\.1\.hook_resid_mid of GPTNeoX.*parallel.*use resid_pre"):
            read(family_lm, IDS, MASK, [Site(LAYER, stream)])
        return
    plain = read(family_lm, IDS, MASK, family_sites)
    parts = {stream: plain[Site(LAYER, stream)] for stream in ("resid_pre", "attn_out", "mlp_out")}
    with edit(family_lm, {Site(LAYER, stream): plus_v}):
        edited = read(family_lm, IDS, MASK, [Site(LAYER)])[Site(LAYER)]
        seen = read(family_lm, IDS, MASK, [Site(LAYER, stream)])[Site(LAYER, stream)]
        after = run(family_lm)
    close(seen, plain[Site(LAYER, stream)] + V)
    if stream == "resid_pre":  # the same as after the layer before, whose edit is checked below
        with edit(family_lm, {Site(LAYER - 1): plus_v}):
            close(edited, read(family_lm, IDS, MASK, [Site(LAYER)])[Site(LAYER)])
            close(after, run(family_lm))
        return
    if stream in ("attn_out", "resid_mid") and not is_parallel(family_lm):  # reaches the norm and the residual
        mid = parts["resid_pre"] + parts["attn_out"] + V
        expected = mid + mlp_by_hand(family_lm, LAYER, mid)
    else:
        expected = sum(parts.values()) + V
    close(edited, expected)
    with edit(family_lm, {Site(LAYER + 1, "resid_pre"): lambda acts, where: expected}):
        close(after, run(family_lm))


def test_an_edit_reaches_embeddings_and_the_head(family_lm):
    embedded = family_lm.model.get_input_embeddings()(IDS)
    with edit(family_lm, {Site(0, "resid_pre"): plus_v}):
        edited = run(family_lm)
    close(edited, family_lm.model(inputs_embeds=embedded + V).logits)
    last = Site(family_lm.n_layers - 1)
    with edit(family_lm, {last: plus_v}):
        edited = run(family_lm)
    close(edited, logits(family_lm, family_lm.final_norm(read(family_lm, IDS, MASK, [last])[last] + V)))


def test_edits_run_in_order_at_one_site_and_over_nested_blocks(tiny):
    site = Site(1, "resid_mid")
    plain = read(tiny, IDS, MASK, [site])[site]

    def double(acts, where):
        return 2 * acts

    with edit(tiny, {site: [plus_v, double]}):
        assert torch.equal(read(tiny, IDS, MASK, [site])[site], 2 * (plain + V))
    with edit(tiny, {site: double}):
        before = read(tiny, IDS, MASK, [site])[site]
        with edit(tiny, {site: plus_v}):
            assert torch.equal(read(tiny, IDS, MASK, [site])[site], 2 * plain + V)
        assert torch.equal(before, 2 * plain)
        assert torch.equal(read(tiny, IDS, MASK, [site])[site], 2 * plain)


def test_hooks_are_gone_after_every_kind_of_failure(tiny):
    def failing(acts, where):
        raise ZeroDivisionError

    plain = run(tiny)
    for edits in ({Site(0): failing}, {Site(2, "resid_mid"): plus_v, Site(0): [plus_v, failing]}):
        with pytest.raises(ZeroDivisionError), edit(tiny, edits):
            run(tiny)
        with pytest.raises(ZeroDivisionError), edit(tiny, edits):
            read(tiny, IDS, MASK, [Site(2)])
    with pytest.raises(KeyError), edit(tiny, {Site(0): plus_v}):
        raise KeyError
    with pytest.raises(InputError, match="below 3"), edit(tiny, {Site(0): plus_v, Site(3): plus_v}):
        pass
    with pytest.raises(InputError, match="below 3"):
        read(tiny, IDS, MASK, [Site(0), Site(3)])
    assert n_hooks(tiny.model) == 0
    assert torch.equal(run(tiny), plain)


@pytest.mark.parametrize("stream", ["resid_mid", "resid_post"])
def test_gradients_pass_through_an_edit_that_keeps_its_input(make_tiny, stream):
    lm = make_tiny("gpt2")  # all of it in float64, unlike models with RMSNorm
    lm.model.double().requires_grad_(False)

    def loss(strength):
        with edit(lm, {Site(1, stream): lambda acts, where: acts + strength * acts * acts}):
            return run(lm).square().mean()

    at, step = torch.tensor(0.5, dtype=torch.double), 1e-5
    with torch.enable_grad():
        strength = at.clone().requires_grad_()
        loss(strength).backward()
    torch.testing.assert_close(strength.grad, (loss(at + step) - loss(at - step)) / (2 * step), rtol=1e-7, atol=0)


def test_what_is_read_has_gradients_only_if_they_are_enabled(tiny):
    with torch.enable_grad():
        assert read(tiny, IDS, MASK, [Site(1)])[Site(1)].requires_grad
    assert not read(tiny, IDS, MASK, [Site(1)])[Site(1)].requires_grad


def test_bad_edits_and_empty_requests(tiny):
    for wrong, received in (
        (lambda acts, where: acts[:, -1:], r"\(2, 1, 32\)"),
        (lambda acts, where: None, "NoneType"),
    ):
        with (
            pytest.raises(InputError, match=rf"edits: .*\(2, 9, 32\), received {received}"),
            edit(tiny, {Site(1): wrong}),
        ):
            run(tiny)
    with pytest.raises(InputError, match="sites: expected at least one"):
        read(tiny, IDS, MASK, [])
    with edit(tiny, {}):
        assert n_hooks(tiny.model) == 0


def test_edits_follow_the_dtype_of_their_layer(make_tiny):
    lm = make_tiny("llama")
    lm.model.bfloat16()
    seen = []

    def steer(acts, where):
        seen.append(acts.dtype)
        return acts + V  # float32

    with edit(lm, {Site(1, stream): steer for stream in STREAMS}):
        assert run(lm).dtype == torch.bfloat16
        assert read(lm, IDS, MASK, [Site(1)])[Site(1)].dtype == torch.bfloat16
    assert set(seen) == {torch.bfloat16}


def test_edits_follow_the_device_of_their_layer(make_tiny):
    """A model over two devices, as accelerate spreads it, with `meta` for the second."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    lm = make_tiny("llama")
    for module in (*lm.layers[1:], lm.final_norm, lm.head):
        add_hook_to_module(module.to("meta"), AlignDevicesHook(execution_device="meta"))
    devices = {}

    def steer(acts, where):
        devices[len(devices)] = acts.device.type
        assert {field.device for field in (where.mask, where.positions, where.roles, where.token_ids)} == {acts.device}
        return torch.where(where.mask[..., None], acts + V.to(acts.device), acts)

    roles = torch.full((2, 9), 2, dtype=torch.uint8)
    with edit(lm, {Site(layer, stream): steer for layer in range(3) for stream in STREAMS}, roles=roles):
        assert run(lm).device.type == "meta"
        assert read(lm, IDS, MASK, [Site(2)])[Site(2)].device.type == "meta"
    assert set(devices.values()) == {"cpu", "meta"}


def test_gpt_neox_dropout_is_part_of_what_is_added(make_tiny):
    lm = make_tiny("gpt_neox", hidden_dropout=0.5)
    lm.model.train()
    acts = read(lm, IDS, MASK, [Site(0, stream) for stream in STREAMS])
    close(acts[Site(0, "resid_mid")], acts[Site(0, "resid_pre")] + acts[Site(0, "attn_out")])
    close(acts[Site(0)], acts[Site(0, "resid_mid")] + acts[Site(0, "mlp_out")])


def test_unknown_architectures_are_errors():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1))
    with pytest.raises(InputError, match=r"families gemma.*model_type 'bloom'"):
        layout_of(model)
