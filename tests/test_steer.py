"""Steering: what each edit does to latents and residuals, and that nothing else changes."""

import gc
import inspect

import pytest
import torch
from tiny_sae import DEAD, KINDS, make_sae

from saetools import steer
from saetools.data import Conversation, Role, pad, tokenize
from saetools.errors import InputError
from saetools.models import Site, Where, edit, final_hidden, logits, read
from saetools.steer import Scope, add, add_direction, clamp, project_out, scale, seen
from saetools.steer.numbers import units
from saetools.steer.seen import placed

SITE = Site(1)
V = torch.randn(32, generator=torch.Generator().manual_seed(2))
CHATS = [
    Conversation.chat("Hi there", "Hello."),
    Conversation.chat("What is the weather like?", "Sunny, and warm."),
]


@pytest.fixture(scope="module")
def lm(make_tiny):
    return make_tiny("llama")


@pytest.fixture(scope="module")
def conversations(tokenizer):
    return list(tokenize(CHATS, tokenizer))


@pytest.fixture(scope="module", params=[True, False], ids=["left", "right"])
def batch(request, conversations):
    return pad(conversations, [0, 1], pad_left=request.param)


@pytest.fixture(autouse=True)
def no_grad(request):
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


def run(lm, batch, *fns):
    """Residual at the site and logits, after edits."""
    with edit(lm, {SITE: fns}, roles=batch.roles):
        acts = read(lm, batch.token_ids, batch.mask, [SITE])[SITE]
        return acts, logits(lm, final_hidden(lm, batch.token_ids, batch.mask))


def dense(sae, acts):
    return sae.encode(acts.reshape(-1, acts.shape[-1])).to_dense().view(*acts.shape[:-1], -1)


def here(acts):
    """Where for tokens that stand for themselves: one row without padding."""
    shape = acts.shape[:2]
    positions = torch.arange(shape[1]).expand(shape)
    return Where(None, torch.ones(shape, dtype=torch.bool), positions, None, torch.arange(shape[0]), None)


@pytest.mark.parametrize("kind", KINDS)
def test_edits_that_ask_for_nothing_change_no_bit(lm, batch, kind):
    sae = make_sae(kind)
    plain = run(lm, batch)
    for fn in (
        scale(sae, [1, 2, DEAD], 1.0),
        scale(sae, DEAD, 5.0),
        steer.ablate(sae, DEAD),
        clamp(sae, [DEAD], 3.0, only_if_active=True),
        clamp(sae, DEAD, 0.0),
        add(sae, [1, 2], 0.0),
        add_direction(V, 0.0),
    ):
        for ours, expected in zip(run(lm, batch, fn), plain, strict=True):
            assert torch.equal(ours, expected), fn


@pytest.mark.parametrize("kind", KINDS)
def test_clamping_to_its_own_value_changes_no_bit(lm, tokenizer, kind):
    sae = make_sae(kind)
    batch = pad(list(tokenize([Conversation(text="ab")], tokenizer)), [0])
    plain = run(lm, batch)
    f = dense(sae, plain[0])[0, 1]
    chosen = torch.tensor([int((f == 0).nonzero()[0]), int(f.argmax())]).sort().values
    own = sae.encode_some(plain[0][0], chosen)[1]
    torch.testing.assert_close(own, f[chosen], rtol=1e-5, atol=1e-6)
    assert sorted((own > 0).tolist()) == [False, True]
    fn = clamp(sae, chosen, own.tolist())
    for ours, expected in zip(run(lm, batch, fn), plain, strict=True):
        assert torch.equal(ours, expected)
    assert not torch.equal(run(lm, batch, clamp(sae, chosen, (own + 0.1).tolist()))[0], plain[0])


@pytest.mark.parametrize("kind", KINDS)
def test_latent_edits_change_their_latents_and_keep_the_error(lm, batch, kind):
    sae = make_sae(kind)
    x, _ = run(lm, batch)
    f = dense(sae, x)
    chosen = batch.counted()
    rates = (f[chosen] > 0).float().mean(0)
    often, second = (rates - 0.5).abs().topk(2, largest=False).indices.tolist()
    assert 0.05 < rates[often] < 0.95
    for fn, values in (
        (clamp(sae, [often, DEAD], [1.5, -0.5]), (1.5, -0.5)),
        (clamp(sae, torch.tensor([often, DEAD]), 2.0), (2, 2)),
        (clamp(sae, [often, DEAD], -2.0, unit="p99"), (-2 * sae.p99[often], -2 * sae.p99[DEAD])),
        (clamp(sae, [often, DEAD], 1.0, only_if_active=True), (torch.where(f[..., often] > 0, 1.0, 0.0), 0)),
        (scale(sae, [often, DEAD], 3.0), (3 * f[..., often], 0)),
        (scale(sae, [DEAD, often], -1.0), (-f[..., often], 0)),
        (steer.ablate(sae, [often, DEAD]), (0, 0)),
    ):
        f_new = f.clone()
        f_new[..., often], f_new[..., DEAD] = values
        expected = torch.where(chosen[..., None], x + (f_new - f) @ sae.W_dec, x)
        edited, _ = run(lm, batch, fn)
        torch.testing.assert_close(edited, expected, rtol=1e-5, atol=1e-5, msg=lambda text, fn=fn: f"{fn}: {text}")
        assert torch.equal(edited[~chosen], x[~chosen])
    one = clamp(sae, second, 2.0)
    both = clamp(sae, [often, second], [1.0, 2.0])
    own = torch.where(chosen[..., None], (2 - f[..., second, None]) * sae.W_dec[second], 0.0)
    torch.testing.assert_close(run(lm, batch, one)[0] - x, own, rtol=1e-4, atol=1e-5)
    other = torch.where(chosen[..., None], (1 - f[..., often, None]) * sae.W_dec[often], 0.0)
    torch.testing.assert_close(run(lm, batch, both)[0] - x, own + other, rtol=1e-4, atol=1e-5)


def test_add_is_a_share_of_the_median_norm_along_unit_rows(lm, batch):
    sae = make_sae(median_norm=2.5)
    x, _ = run(lm, batch)
    units = sae.W_dec[[3, 11]] / sae.W_dec[[3, 11]].norm(dim=1, keepdim=True)
    step = torch.where(batch.counted()[..., None], -0.4 * 2.5 * units.sum(0), 0.0)
    torch.testing.assert_close(run(lm, batch, add(sae, [3, 11], -0.4))[0], x + step)
    torch.testing.assert_close(run(lm, batch, add_direction(units.sum(0), -1.0))[0], x + step)
    assert float((run(lm, batch, add(sae, 3, 0.2))[0] - x)[batch.counted()].norm(dim=1).mean()) == pytest.approx(0.5)


def test_project_out_leaves_nothing_along_the_direction(lm, batch):
    x, _ = run(lm, batch)
    fn = project_out(5 * V)
    once, _ = run(lm, batch, fn)
    assert (once @ V)[batch.counted()].abs().max() < 1e-5
    assert (x @ V)[batch.counted()].abs().max() > 0.1
    torch.testing.assert_close(run(lm, batch, fn, project_out(V))[0], once)
    across = x - (x @ V)[..., None] * V / (V @ V)
    torch.testing.assert_close(once[batch.counted()], across[batch.counted()], rtol=1e-5, atol=1e-5)
    everywhere = project_out(V).on(skip_first=False)
    assert (run(lm, batch, everywhere)[0] @ V)[batch.mask].abs().max() < 1e-5


@pytest.mark.parametrize("change", [clamp(make_sae(), 3, 9.0), add_direction(V, 1.0)], ids=repr)
def test_scopes_choose_tokens_in_padded_batches(lm, batch, conversations, change):
    x, _ = run(lm, batch)
    roles = {role: (batch.roles & int(role)) != 0 for role in Role}
    special = torch.isin(batch.token_ids, torch.tensor(lm.tokenizer.all_special_ids))
    assert bool((special & batch.counted()).any())
    places = batch.mask.cumsum(1) - 1
    for tokens, options, expected in (
        ((), {}, batch.counted()),
        (("all",), {"skip_first": False}, batch.mask),
        ((), {"start": 5}, batch.mask & (places >= 5)),
        ((), {"start": 1, "skip_first": False}, batch.counted()),
        ((), {"skip_special": True}, batch.counted() & ~special),
        (("response",), {}, roles[Role.RESPONSE]),
        (("prompt",), {}, roles[Role.PROMPT]),
        (("header",), {}, roles[Role.HEADER]),
        (("last_prompt",), {}, roles[Role.LAST_PROMPT]),
        (("template",), {}, batch.counted() & roles[Role.TEMPLATE]),
        (("template",), {"skip_first": False}, roles[Role.TEMPLATE]),
        (("prompt", "response"), {"start": 9}, (roles[Role.PROMPT] | roles[Role.RESPONSE]) & (places >= 9)),
    ):
        fn = change.on(*tokens, **options)
        edited, out = run(lm, batch, fn)
        assert torch.equal((edited != x).any(-1), expected), fn
        for row, conversation in enumerate(conversations):
            alone = run(lm, pad([conversation], [0]), fn)
            for ours, single in zip((edited, out), alone, strict=True):
                torch.testing.assert_close(ours[row][batch.mask[row]], single[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
@pytest.mark.parametrize("tokens", ["all", "prompt", "response", "generated"])
def test_a_cache_changes_nothing(lm, tokenizer, kind, tokens):
    from transformers import DynamicCache

    prompts = [Conversation.chat("Hi there"), Conversation.chat("What is the weather like?")]
    batch = pad(list(tokenize(prompts, tokenizer, add_generation_prompt=True)), [0, 1], pad_left=True)
    answer = torch.tensor([[60, 61, 62], [63, 64, 65]])
    ids = torch.cat([batch.token_ids, answer], dim=1)
    mask = torch.cat([batch.mask, torch.ones(2, 3, dtype=torch.bool)], dim=1)
    fns = [clamp(make_sae(kind), [3, 5], 4.0).on(tokens), project_out(V).on(tokens)]
    width = batch.token_ids.shape[1]
    with edit(lm, {SITE: fns}, roles=batch.roles):
        whole = final_hidden(lm, ids, mask)
        cache = DynamicCache(config=lm.model.config)
        parts = [
            final_hidden(lm, ids[:, start:end], mask[:, :end], cache=cache)
            for start, end in ((0, width), (width, width + 1), (width + 1, width + 3))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask], whole[mask], rtol=1e-4, atol=1e-5)
    plain = final_hidden(lm, ids, mask)
    edited_from = width if tokens in ("response", "generated") else 0
    assert torch.equal(whole[:, :edited_from], plain[:, :edited_from])
    assert not torch.allclose(whole[:, edited_from:], plain[:, edited_from:], atol=1e-2)


def test_edits_compose_in_their_order(lm, batch):
    sae = make_sae("relu")
    push, fix = add_direction(sae.encoder[3], 1.0), clamp(sae, 3, 2.0)
    in_order, _ = run(lm, batch, push, fix)
    with edit(lm, {SITE: push}, roles=batch.roles):
        nested, _ = run(lm, batch, fix)
    assert torch.equal(nested, in_order)
    assert not torch.allclose(run(lm, batch, fix, push)[0], in_order, atol=1e-2)
    with edit(lm, {SITE: push}, roles=batch.roles):
        after_push = read(lm, batch.token_ids, batch.mask, [SITE])[SITE]
    f = dense(sae, after_push)[..., 3, None]
    expected = torch.where(batch.counted()[..., None], after_push + (2 - f) * sae.W_dec[3], after_push)
    torch.testing.assert_close(in_order, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_in_scope_changes_nothing(lm, tokenizer, kind):
    batch = pad(list(tokenize([Conversation(text="only a text")], tokenizer)), [0])
    plain, _ = run(lm, batch)
    assert torch.equal(run(lm, batch, clamp(make_sae(kind), 3, 9.0).on("response"))[0], plain)


def test_latents_can_be_clamped_where_none_fires():
    sae = make_sae("relu")
    sae.b_enc.fill_(-1000.0)
    x = torch.randn(1, 3, 32)
    change = clamp(sae, [3, 4], [1.0, 2.0])(x, here(x)) - x
    torch.testing.assert_close(change[0, 1:], (sae.W_dec[3] + 2 * sae.W_dec[4]).expand(2, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_low_precision_are_edited_in_float32(dtype):
    sae = make_sae("relu")
    acts = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    where = here(acts)
    x = acts.float()
    for fn in (clamp(sae, [3, 4], 1.7), add(sae, 3, 0.3), project_out(V)):
        edited = fn(acts, where)
        assert edited.dtype == dtype
        assert torch.equal(edited, fn(x, where).to(dtype)), fn
    assert torch.equal(scale(sae, [3, 4], 1.0)(acts, where), acts)
    low = make_sae("relu", dtype=dtype)
    assert torch.equal(scale(low, [3, 4], 1.0)(x, where), x)
    torch.testing.assert_close(add(low, 3, 0.3)(x, where), add(sae, 3, 0.3)(x, where), rtol=1e-2, atol=1e-2)


def test_the_sae_follows_the_layer():
    sae = make_sae()
    assert placed(sae, torch.device("cpu")) is sae
    moved = placed(sae, torch.device("meta"))
    assert {parameter.device.type for parameter in moved.parameters()} == {"meta"}
    assert placed(sae, torch.device("meta")) is moved
    assert sae.W_dec.device.type == "cpu"
    n_known = len(seen._COPIES)
    del sae
    gc.collect()
    assert len(seen._COPIES) == n_known - 1


def test_an_edit_asks_for_the_sae_on_the_device_of_its_layer(monkeypatch):
    asked, stand_in = [], make_sae()
    monkeypatch.setattr(seen, "placed", lambda sae, device: asked.append(device) or stand_in)
    far = make_sae().to("meta")
    x = torch.randn(1, 3, 32)
    assert torch.equal(steer.ablate(far, 3)(x, here(x)), steer.ablate(stand_in, 3)(x, here(x)))
    assert set(asked) == {x.device}


@pytest.mark.parametrize("fn", [clamp(make_sae(), 3, 2.0), add_direction(V, 1.0)], ids=repr)
def test_the_gradient_passes_an_edit_as_it_passes_the_identity(fn):
    x = torch.randn(1, 4, 32, requires_grad=True)
    fn(x, here(x)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda sae: clamp(sae, 48, 1.0), r"latents: expected one or more of 0 to 47, received \[48\]"),
        (lambda sae: scale(sae, [0, -1], 1.0), r"latents: .*received \[-1\]"),
        (lambda sae: steer.ablate(sae, []), "latents: .*received none"),
        (lambda sae: steer.ablate(sae, [1, 1]), "latents: expected each latent once"),
        (lambda sae: clamp(sae, [1, 2], [1.0]), "value: expected finite numbers.*; give one, or 2"),
        (lambda sae: clamp(sae, 1, float("nan")), "value: expected finite numbers"),
        (lambda sae: clamp(make_sae_without("p99"), 1, 1.0, unit="p99"), "unit: .*measure_latents"),
        (lambda sae: add(make_sae(median_norm=None), 1, 1.0), "sae: .*measure_latents"),
        (lambda sae: add(sae, 1, float("inf")), "strength: expected finite numbers"),
        (lambda sae: scale(sae, 1, float("nan")), "factor: expected finite numbers"),
        (lambda sae: add_direction(V, float("nan")), "strength: expected a finite number"),
        (lambda sae: add_direction(V * float("nan"), 1.0), "direction: .*received NaN"),
        (lambda sae: project_out(torch.zeros(32)), "direction: .*zero vector"),
        (lambda sae: project_out(torch.stack([V, V])), "direction: expected directions that do not depend"),
        (lambda sae: add_direction(0 * V, 1.0, median_norm=2.0), "direction: .*zero vector"),
        (lambda sae: add_direction(V, 1.0, name="two words"), "name: expected a letter, then letters"),
        (lambda sae: steer.cap(V, low=2.0, high=1.0), "low: expected at most high, 1.0, received 2.0"),
        (lambda sae: steer.cap(V, high=float("nan")), "low: expected bounds that are numbers"),
        (lambda sae: steer.cap(V, low=float("inf")), "low: expected bounds that are numbers"),
        (lambda sae: steer.project_out(V[None][:0]), "direction: expected at least one, received none"),
        (lambda sae: steer.mean_ablate(V, V * float("nan")), "mean: expected a finite vector"),
        (lambda sae: steer.affine(torch.eye(32), V * float("nan")), "bias: expected a finite vector"),
        (
            lambda sae: add(with_zero_row(sae, 3), 3, 1.0),
            r"latents: expected latents that write something, received \[3\]",
        ),
        (
            lambda sae: clamp(make_sae(input_norm="layer_norm"), 3, 1.0, unit="norm"),
            "unit: expected activation or p99, for",
        ),
        (lambda sae: clamp(sae, 10**30, 1.0), "latents: expected 0 to 47, received a larger number"),
        (lambda sae: steer.probe(V, name="5"), "name: expected a letter"),
        (lambda sae: steer.affine(torch.eye(3), name="a + b"), "name: expected a letter"),
        (lambda sae: steer.project_out(V, name="unless"), "name: expected a letter"),
        (lambda sae: steer.project_to(V, float("inf")), "value: expected a finite number"),
        (lambda sae: inspect.unwrap(steer.mean_ablate)(V, torch.ones(3)), "mean: expected length 32, received 3"),
        (
            lambda sae: inspect.unwrap(steer.affine)(torch.eye(3)[:2]),
            r"matrix: expected a finite square matrix, received \(2, 3\)",
        ),
        (lambda sae: inspect.unwrap(steer.affine)(torch.eye(3), torch.ones(2)), "bias: expected length 3, received 2"),
        (lambda sae: steer.active(sae, 48), "latents: expected one or more of 0 to 47"),
        (lambda sae: steer.active(sae, 1, above=float("nan")), "above: expected a finite number"),
        (lambda sae: steer.ablate(sae, 1).on(start=-1), "start: expected 0 or more"),
        (lambda sae: steer.ablate(sae, 1).over({}), "points: expected weights by number"),
        (lambda sae: steer.ablate(sae, 1).over({-1: 1.0}), "points: expected weights by number"),
    ],
)
def test_what_cannot_be_done_is_an_error(make, message):
    with pytest.raises(InputError, match=message):
        make(make_sae())


def make_sae_without(name):
    sae = make_sae()
    setattr(sae, name, None)
    return sae


def with_zero_row(sae, latent):
    with torch.no_grad():
        sae.W_dec[latent] = 0
    return sae


def test_names_are_checked_where_types_are_not():
    scope = Scope()
    object.__setattr__(scope, "tokens", ("answers",))
    with pytest.raises(InputError, match="tokens: expected some of all, prompt, last_prompt"):
        scope.__post_init__()
    with pytest.raises(InputError, match="unit: expected activation, p99 or norm, received 'percent'"):
        inspect.unwrap(units)("unit", make_sae(), torch.tensor([1]), "percent")


def test_edits_that_do_not_fit_the_pass_are_errors():
    x = torch.randn(1, 3, 32)
    with pytest.raises(InputError, match=r"tokens: .*'response' without roles; pass roles=batch\.roles"):
        add_direction(V, 1.0).on("response")(x, here(x))
    for fn in (add_direction(V, 1.0).on("generated"), add_direction(V, 1.0).over({0: 1.0})):
        with pytest.raises(InputError, match=r"width: .*; pass width=input_ids\.shape\[1\] where"):
            fn(x, here(x))
    with pytest.raises(InputError, match="skip_special: expected token ids"):
        add_direction(V, 1.0).on(skip_special=True)(x, here(x))
    for fn in (
        add_direction(torch.ones(1), 1.0),
        project_out(torch.ones(16)),
        steer.affine(torch.eye(16)),
        add_direction(V, 1.0).when(steer.probe(torch.ones(16))),
    ):
        with pytest.raises(InputError, match="direction: expected length 32"):
            fn(x, here(x))
    with pytest.raises(InputError, match=r"expected activations of shape \[token, 16\]"):
        clamp(make_sae(d_in=16), 1, 1.0)(x, here(x))
