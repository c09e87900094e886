"""Edits as TransformerLens hook functions, and on modules of models that saetools does not know."""

import pytest
import torch
from test_transformer_lens import BRIDGED, IDS, MASK, V, boot, hooked_of, sites_of, steer
from torch import nn

from saetools import steer as steering
from saetools.errors import InputError
from saetools.models import Site, edit, edit_modules, final_hidden, hook_functions, logits

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", BRIDGED)
def test_hook_functions_do_what_edit_does_on_a_bridge(make_tiny, family):
    bridge, plain = boot(make_tiny(family)), make_tiny(family)
    for site in sites_of(family):
        with edit(plain, {site: steer}):
            expected = logits(plain, final_hidden(plain, IDS, MASK))
        with hook_functions(bridge, {site: steer}) as hooks:
            found = bridge.run_with_hooks(IDS, attention_mask=MASK.long(), fwd_hooks=hooks)
        torch.testing.assert_close(found[MASK], expected[MASK], rtol=1e-5, atol=1e-5, msg=f"{site}")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hook_functions_do_what_edit_does_on_a_hooked_transformer(make_tiny, family):
    plain = make_tiny(family)
    hooked = hooked_of(plain, family)
    edits = {site: steer for site in sites_of(family) if site.layer == 1} | {Site(2): [steer, steering.project_out(V)]}
    with edit(plain, edits):
        expected = logits(plain, final_hidden(plain, IDS, MASK))
    with hook_functions(hooked, edits) as hooks:
        found = hooked.run_with_hooks(IDS, attention_mask=MASK.long(), fwd_hooks=hooks)
    torch.testing.assert_close(found[MASK], expected[MASK], rtol=1e-5, atol=1e-5)
    again = hooked.run_with_hooks(IDS, attention_mask=MASK.long(), fwd_hooks=[])
    torch.testing.assert_close(again[MASK], logits(plain, final_hidden(plain, IDS, MASK))[MASK], rtol=1e-5, atol=1e-5)


def test_hook_functions_run_in_an_order_with_other_hooks(make_tiny):
    hooked = hooked_of(make_tiny("llama"), "llama")
    name = "blocks.1.hook_resid_post"
    found = []
    with hook_functions(hooked, {Site(1): steering.add_direction(V, 2.0).on(skip_first=False)}) as [(at, ours)]:
        assert at == name
        keep = (name, lambda acts, hook: found.append(acts.clone()))
        hooked.run_with_hooks(IDS[:1], fwd_hooks=[keep, (at, ours), keep])
    torch.testing.assert_close(found[1] - found[0], V.expand_as(found[0]) * 2, rtol=1e-4, atol=1e-5)


def test_hook_functions_need_a_transformer_lens_model(tiny):
    with (
        pytest.raises(InputError, match="model: expected a HookedTransformer or a TransformerBridge, received Llama"),
        hook_functions(tiny.model, {}),
    ):
        pass


class Block(nn.Module):
    """A transformer block of nobody's family."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x):
        return self.mlp(x + self.attention(x, x, x)[0])


class Strange(nn.Module):
    """A model of nobody's family."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(300, 32), nn.ModuleList([Block(), Block()])

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def test_modules_of_any_model_can_be_edited():
    torch.manual_seed(0)
    model = Strange().eval()
    ids, mask = torch.tensor([[9, 9, 1, 2, 3]]), torch.tensor([[0, 0, 1, 1, 1]])
    push = steering.add_direction(V, 1.0)
    plain = model(ids, attention_mask=mask)
    with edit_modules(model, {"blocks.1": push}):
        pushed = model(ids, attention_mask=mask)
        assert (pushed - plain).abs().sum(-1)[0].gt(1e-4).tolist() == [False, False, False, True, True]
        whole = model(ids)
    assert (whole - model(ids)).abs().sum(-1)[0].gt(1e-4).tolist() == [False, True, True, True, True]
    assert torch.equal(model(ids, attention_mask=mask), plain)
    with edit_modules(model, {"blocks.1": [push, steering.project_out(V)]}, access="input"):
        into = model(ids)
    with edit_modules(model, {"blocks.0": [push, steering.project_out(V)]}):
        torch.testing.assert_close(model(ids), into)
    with edit_modules(model.blocks[0], {"mlp": push}):  # of a model that gets no tokens
        x = torch.randn(2, 4, 32)
        moved = model.blocks[0](x)
    torch.testing.assert_close(moved[:, 1:], model.blocks[0](x)[:, 1:] + V)
    assert torch.equal(moved[:, 0], model.blocks[0](x)[:, 0])


def test_edit_modules_does_what_edit_does(tiny):
    edits = [steering.add_direction(V, 1.0), steering.project_out(V).on(start=2)]
    with edit(tiny, {Site(1): edits}):
        expected = tiny.model(IDS, attention_mask=MASK.long()).logits
    with edit_modules(tiny.model, {"model.layers.1": edits}):
        assert torch.equal(tiny.model(IDS, attention_mask=MASK.long()).logits, expected)


def test_modules_that_cannot_be_edited_are_errors():
    model = nn.Sequential(nn.Linear(32, 32))
    with (
        pytest.raises(InputError, match="edits: expected names of modules of the model, received '1'"),
        edit_modules(model, {"1": steer}),
    ):
        pass
    with (
        pytest.raises(InputError, match=r"expected modules with activations of shape \[row, pos, width\]"),
        edit_modules(model, {"0": steer}),
    ):
        model(torch.ones(2, 32))


class Named(nn.Module):
    """Takes and gives named tensors."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.kind = nn.Linear(32, 32), kind

    def forward(self, *, states, scale):
        x = scale * self.inner(states)
        return {"tuple": (x, scale), "dict": {"scale": scale, "x": x}, "other": [x]}[self.kind]


def test_modules_with_named_inputs_and_outputs(tiny):
    x = torch.randn(2, 4, 32)
    push = steering.add_direction(V, 1.0)
    for kind, name in (("tuple", 0), ("dict", "x")):
        model = nn.ModuleDict({"named": Named(kind)})
        plain = model["named"](states=x, scale=2.0)[name]
        with edit_modules(model, {"named": push}):
            torch.testing.assert_close(model["named"](states=x, scale=2.0)[name][:, 1:], plain[:, 1:] + V)
        with edit_modules(model, {"named": push}, access="input"):
            moved = model["named"](states=x, scale=2.0)[name]
        torch.testing.assert_close(moved[:, 1:], plain[:, 1:] + 2 * V @ model["named"].inner.weight.T)
    model = nn.ModuleDict({"named": Named("other")})
    with edit_modules(model, {"named": push}), pytest.raises(InputError, match="received list of Named"):
        model["named"](states=x, scale=2.0)
    with edit_modules(tiny.model, {"model": push}):  # a ModelOutput
        hidden = tiny.model.model(IDS[:1]).last_hidden_state
    torch.testing.assert_close(hidden[:, 1:], tiny.model.model(IDS[:1]).last_hidden_state[:, 1:] + V)
