"""Base and tuned model as views of one set of weights."""

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from saetools.errors import FetchError, InputError
from saetools.models import Site, check_pair, edit, final_hidden, load_model, logits, read, scaled_adapter
from saetools.models.adapters import borrowed_adapter

IDS = torch.randint(0, 200, (2, 6), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(2, 6, dtype=torch.bool)

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")


@pytest.fixture(scope="session")
def folders(make_tiny, tmp_path_factory):
    """Adapters of a tiny Llama; `b` is on other modules, `head` has an output layer, `wide` and `deep` do not fit."""

    def save(name, lm, **settings):
        folder = tmp_path_factory.mktemp("adapters") / name
        torch.manual_seed(len(name) + ord(name[0]))
        config = LoraConfig(r=4, init_lora_weights=False, **{"target_modules": ["q_proj", "down_proj"], **settings})
        peft = get_peft_model(lm.model, config)
        for parameter in peft.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        peft.save_pretrained(folder)
        return folder

    return {
        "a": save("a", make_tiny("llama")),
        "b": save("b", make_tiny("llama"), target_modules=["v_proj", "up_proj"]),
        "head": save("head", make_tiny("llama"), modules_to_save=["lm_head"]),
        "wide": save("wide", make_tiny("llama", hidden_size=48, head_dim=12)),
        "deep": save("deep", make_tiny("llama", num_hidden_layers=2)),
    }


def run(lm):
    with torch.no_grad():
        return logits(lm, final_hidden(lm, IDS, MASK))


def flags(lm):
    return {name: parameter.requires_grad for name, parameter in lm.model.named_parameters()}


def state(lm):
    from peft.tuners.lora import LoraLayer

    layers = [module for module in lm.model.modules() if isinstance(module, LoraLayer)]
    return {(tuple(layer.active_adapters), layer.disable_adapters) for layer in layers}


def differ(a, b):
    return not torch.allclose(a, b, atol=1e-2)


def test_views_are_the_models_that_peft_gives(make_tiny, folders):
    plain = run(make_tiny("llama"))
    by_peft = {}
    for name in ("a", "b"):
        with torch.no_grad():
            by_peft[name] = PeftModel.from_pretrained(make_tiny("llama").model, folders[name])(IDS).logits
    lm = load_model(make_tiny("llama"), adapter={"a": folders["a"], "b": folders["b"]})
    assert (lm.adapter, lm.adapters, lm.base.adapter) == ("a", ("a", "b"), None)
    assert lm.base.model is lm.model is lm.with_adapter("b").model
    assert differ(by_peft["a"], plain)
    assert differ(by_peft["a"], by_peft["b"])
    for view, expected in (
        (lm, by_peft["a"]),
        (lm.base, plain),
        (lm.with_adapter("b"), by_peft["b"]),
        (lm, by_peft["a"]),
    ):
        torch.testing.assert_close(run(view), expected)
    check_pair(lm.base, lm)


def test_provenance_names_each_adapter(tiny, folders):
    lm = load_model(tiny, adapter={"good": folders["a"], "bad": folders["b"]})
    adapters = lm.provenance["adapters"]
    assert {name: entry["source"] for name, entry in adapters.items()} == {"good": "a", "bad": "b"}
    assert len({entry["weights_sha256"] for entry in adapters.values()}) == 2


def test_earlier_views_stay_as_they_were(tiny, folders):
    plain = run(tiny)
    first = load_model(tiny, adapter=folders["a"])
    assert first.adapter == "a"
    assert torch.equal(run(tiny), plain)
    seen = run(first)
    for source in (first, tiny):  # through the wrapper of the first, and from a view that knows none
        second = load_model(source, adapter={f"b{source is tiny}": folders["b"]})
        assert torch.equal(run(tiny), plain)
        assert torch.equal(run(first), seen)
        assert differ(run(second), seen)
        assert differ(run(second), plain)
    assert tiny.adapters == ("a", "bFalse", "bTrue")


@pytest.mark.parametrize("selected", ["a", "b"])
@pytest.mark.parametrize("disabled", [True, False])
def test_a_view_leaves_the_weights_as_it_found_them(tiny, folders, selected, disabled):
    lm = load_model(tiny, adapter={"a": folders["a"], "b": folders["b"]})
    lm.peft.set_adapter(selected)
    trainable = {name: "lora_B" in name and selected in name for name in flags(lm)}
    for name, parameter in lm.model.named_parameters():
        parameter.requires_grad_(trainable[name])
    expected = {((selected,), disabled)}

    def check():
        for view in (lm, lm.base, lm.with_adapter("b")):
            with view.active():
                assert {active if not off else None for (active,), off in state(lm)} == {view.adapter}
                assert flags(lm) == trainable
                with lm.base.active(), lm.with_adapter("b").active():
                    assert state(lm) == {(("b",), False)}
                assert {active if not off else None for (active,), off in state(lm)} == {view.adapter}
            with pytest.raises(ZeroDivisionError), view.active():
                raise ZeroDivisionError
            assert state(lm) == expected
            assert flags(lm) == trainable

    if disabled:
        with lm.peft.disable_adapter():
            for name, parameter in lm.model.named_parameters():
                parameter.requires_grad_(trainable[name])
            check()
        assert state(lm) == {((selected,), False)}
    else:
        check()


def test_gradients_reach_the_adapter_of_the_view(tiny, folders):
    lm = load_model(tiny, adapter={"a": folders["a"], "b": folders["b"]}).with_adapter("b")
    for name, parameter in lm.model.named_parameters():
        parameter.requires_grad_("lora" in name)
    logits(lm, final_hidden(lm, IDS, MASK)).sum().backward()
    used = {name.split(".")[-2] for name, parameter in lm.model.named_parameters() if parameter.grad is not None}
    assert used == {"b"}


def test_a_view_uses_its_own_output_layer(make_tiny, folders):
    with torch.no_grad():
        expected = PeftModel.from_pretrained(make_tiny("llama").model, folders["head"])(IDS).logits
    lm = load_model(make_tiny("llama"), adapter={"head": folders["head"], "a": folders["a"]})
    torch.testing.assert_close(run(lm), expected)
    torch.testing.assert_close(run(lm.base), run(make_tiny("llama")))
    torch.testing.assert_close(run(lm.with_adapter("a")), run(load_model(make_tiny("llama"), adapter=folders["a"])))
    torch.testing.assert_close(run(lm), expected)


@pytest.mark.parametrize("disabled", [True, False])
@pytest.mark.parametrize("injected", [True, False])
def test_loaded_models_with_adapters_are_taken_as_they_are(make_tiny, tokenizer, folders, disabled, injected):
    peft = PeftModel.from_pretrained(make_tiny("llama").model, folders["a"], adapter_name="mine")
    if disabled:
        peft.base_model.disable_adapter_layers()
    lm = load_model(peft.get_base_model() if injected else peft, tokenizer=tokenizer)
    assert lm.adapter == (None if disabled else "mine")
    assert lm.adapters == ("mine",)
    torch.testing.assert_close(run(lm.base), run(make_tiny("llama")))
    assert differ(run(lm.with_adapter("mine")), run(lm.base))
    with_other = load_model(lm, adapter={"other": folders["b"]})
    assert with_other.adapters == ("mine", "other")
    assert differ(run(with_other), run(lm))


def test_edits_reach_every_view_and_the_peft_wrapper(tiny, folders):
    lm = load_model(tiny, adapter=folders["a"])
    with edit(lm, {Site(1, "attn_out"): lambda acts, where: 0 * acts}):
        edited = run(lm)
        with torch.no_grad():
            torch.testing.assert_close(lm.peft(IDS).logits, edited)
        assert not read(lm.base, IDS, MASK, [Site(1, "attn_out")])[Site(1, "attn_out")].any()
    assert differ(run(lm), edited)


def test_adapters_that_cannot_be_loaded_are_errors(make_tiny, tiny, folders, tmp_path):
    lm = load_model(tiny, adapter=folders["a"])
    (tmp_path / "file").touch()
    for adapter, message in (
        (tmp_path, "adapter: expected a PEFT adapter folder with adapter_config.json"),
        (tmp_path / "file", "adapter: expected a PEFT adapter folder"),
        ({}, "adapter: expected at least one"),
        ({"a": folders["b"]}, "adapter: expected new names, received 'a'"),
        (tmp_path / "gone", "adapter: expected .*gone"),
        ("nobody/nothing", "adapter: expected .*nobody/nothing"),
        ({"wide": folders["wide"]}, "adapter: expected files that fit the model.*size mismatch"),
        ({"deep": folders["deep"]}, "adapter: expected files that fit the model.*weights are missing"),
    ):
        with pytest.raises((InputError, FetchError), match=message):
            load_model(lm, adapter=adapter)
    with pytest.raises(InputError, match="weights are missing"):
        load_model(make_tiny("llama"), adapter=folders["deep"])
    with pytest.raises(InputError, match=r"adapter: .*Target modules"):
        load_model(make_tiny("gpt2"), adapter=folders["a"])
    with pytest.raises(InputError, match=r"one of the loaded adapters a, received 'c'"):
        lm.with_adapter("c")
    with pytest.raises(InputError, match=r"one of the loaded adapters \(none\)"):
        make_tiny("llama").with_adapter("a")


def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(tiny, folders):
    plain = run(tiny)
    for name in ("wide", "deep"):
        with pytest.raises(InputError):
            load_model(tiny, adapter=folders[name])
        assert torch.equal(run(tiny), plain)
        assert tiny.adapters == ()
    tuned = load_model(tiny, adapter={"a": folders["a"]})
    seen = run(tuned)
    for name in ("wide", "deep"):
        with pytest.raises(InputError):
            load_model(tuned, adapter=folders[name])
        assert torch.equal(run(tuned), seen)
        assert torch.equal(run(tiny), plain)
        assert tiny.adapters == ("a",)


def test_virtual_tokens_are_an_error(tiny, tokenizer):
    peft = get_peft_model(tiny.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(InputError, match="such as LoRA, received PROMPT_TUNING"):
        load_model(peft, tokenizer=tokenizer)


def test_an_adapter_folder_is_no_model(folders):
    with pytest.raises(InputError, match=r"source: expected a model, received the adapter folder .*adapter="):
        load_model(folders["a"])


def test_a_scaled_adapter_goes_from_base_to_tuned_and_back(make_tiny, folders):
    lm = load_model(make_tiny("llama"), adapter={"a": folders["a"], "b": folders["b"]})
    plain, tuned, other = run(lm.base), run(lm), run(lm.with_adapter("b"))
    with scaled_adapter(lm, 0.0):
        assert torch.equal(run(lm), plain)
        assert torch.equal(run(lm.with_adapter("b")), other)
    with scaled_adapter(lm, 1.0) as view:
        assert view is lm
        assert torch.equal(run(lm), tuned)
    with scaled_adapter(lm, 0.25), scaled_adapter(lm, 2.0):  # they multiply
        nested = run(lm)
    with scaled_adapter(lm, 0.5):
        assert torch.equal(run(lm), nested)
        assert differ(run(lm), plain)
        assert differ(run(lm), tuned)
        assert torch.equal(run(lm.base), plain)
    with pytest.raises(ZeroDivisionError), scaled_adapter(lm, -3.0):
        raise ZeroDivisionError
    assert torch.equal(run(lm), tuned)


def test_half_a_lora_is_the_model_with_half_the_product(make_tiny, folders):
    lm = load_model(make_tiny("llama"), adapter={"a": folders["a"]})
    with scaled_adapter(lm, 0.5):
        half = run(lm)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.5)
    torch.testing.assert_close(run(lm), half)


def test_adapters_that_are_no_sum_cannot_be_scaled(make_tiny, tiny, folders):
    from peft import IA3Config

    head = load_model(make_tiny("llama"), adapter={"head": folders["head"]})
    kinds = [
        (head, "whole layers of its own"),
        (tiny, "the model without"),
        (LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]), "DoRA"),
        (LoraConfig(r=2, bias="lora_only", target_modules=["q_proj"]), "biases of its own"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "another kind of adapter"),
    ]
    for kind, message in kinds:
        lm = kind
        if not hasattr(kind, "adapter"):
            model = make_tiny("llama")
            lm = load_model(get_peft_model(model.model, kind, adapter_name="mine"), tokenizer=model.tokenizer)
        with pytest.raises(InputError, match=f"lm: .*{message}"), scaled_adapter(lm, 0.5):
            pass
    lm = load_model(make_tiny("llama"), adapter={"a": folders["a"]})
    with pytest.raises(InputError, match="scale: expected a finite number"), scaled_adapter(lm, float("nan")):
        pass


@pytest.mark.parametrize("loaded", [True, False])
def test_a_borrowed_adapter_is_seen_and_gone(make_tiny, folders, loaded):
    lm = make_tiny("llama")
    plain = run(lm)
    if loaded:
        lm = load_model(lm, adapter={"a": folders["a"], "borrowed_0": folders["a"]})
    names, seen = lm.adapters, run(lm)
    expected = run(load_model(make_tiny("llama"), adapter=folders["b"]))
    modules = {name for name, _ in lm.model.named_modules()}
    for _ in range(2):
        with borrowed_adapter(lm.base, folders["b"]) as view:
            torch.testing.assert_close(run(view), expected)
            assert torch.equal(run(lm.base), plain)
            assert torch.equal(run(lm), seen)
        assert lm.adapters == names
        assert torch.equal(run(lm.base), plain)
        assert torch.equal(run(lm), seen)
    with pytest.raises(ZeroDivisionError), borrowed_adapter(lm.base, folders["b"]) as view, view.active():
        raise ZeroDivisionError
    assert lm.adapters == names
    assert torch.equal(run(lm), seen)
    assert not any("borrowed_1" in name for name, _ in lm.model.named_parameters())
    if not loaded:
        assert {name for name, _ in lm.model.named_modules()} == modules
    with pytest.raises(InputError, match="weights are missing"), borrowed_adapter(lm.base, folders["deep"]):
        pass
    assert lm.adapters == names
    assert torch.equal(run(lm), seen)
