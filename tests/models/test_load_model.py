"""Loading from folders and loaded objects, and what is said when that fails."""

import inspect
import json

import pytest
import torch

from saetools.errors import FetchError, InputError, IntegrityError, SaetoolsWarning
from saetools.models import LanguageModel, check_pair, load_model

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def run(lm):
    with torch.no_grad():
        return lm.model(IDS).logits


@pytest.fixture
def folder(tiny, tmp_path):
    """A tiny Llama on disk."""
    tiny.model.save_pretrained(tmp_path / "tiny-llama")
    tiny.tokenizer.save_pretrained(tmp_path / "tiny-llama")
    return tmp_path / "tiny-llama"


def test_a_folder_loads(tiny, folder):
    for source in (folder, str(folder)):
        lm = load_model(source)
        assert torch.equal(run(lm), run(tiny))
        assert not lm.model.training
        assert lm.tokenizer.chat_template == tiny.tokenizer.chat_template
        assert (lm.name, lm.adapter, lm.adapters, lm.d_model) == ("tiny-llama", None, (), 32)
        assert lm.provenance["source"] == "tiny-llama"
        assert lm.provenance["dtype"] == "float32"
        assert set(lm.provenance["weights_sha256"]) == {"model.safetensors"}
        assert len(lm.provenance["chat_template_sha256"]) == 64
    assert repr(lm) == "LanguageModel('tiny-llama', LlamaForCausalLM, d_model=32)"


def test_dtype_is_the_checkpoints_unless_asked(make_tiny, tmp_path):
    lm = make_tiny("gpt2")
    lm.model.bfloat16().save_pretrained(tmp_path)
    assert load_model(tmp_path, tokenizer=lm.tokenizer).model.dtype == torch.bfloat16
    asked = load_model(tmp_path, tokenizer=lm.tokenizer, dtype=torch.float32)
    assert asked.model.dtype == torch.float32
    assert asked.provenance["dtype"] == "float32"


def test_loaded_models_are_taken_as_they_are(tiny, tokenizer):
    lm = load_model(tiny.model.train(), tokenizer=tokenizer)
    assert lm.model is tiny.model
    assert not lm.model.training
    assert lm.tokenizer is tokenizer
    again = load_model(lm, tokenizer="".join(tokenizer.name_or_path))
    assert again.model is lm.model
    assert again.tokenizer is not tokenizer
    assert again.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert isinstance(again, LanguageModel)


def test_a_loaded_model_finds_its_tokenizer_by_name(folder, tokenizer):
    from transformers import AutoModelForCausalLM

    lm = load_model(AutoModelForCausalLM.from_pretrained(folder))
    assert lm.name == "tiny-llama"
    assert lm.tokenizer.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("settings", [{"dtype": torch.bfloat16}, {"revision": "main"}, {"quantization": "8bit"}])
def test_settings_of_files_are_errors_for_loaded_models(tiny, settings):
    with pytest.raises(InputError, match=f"{next(iter(settings))}: expected nothing beside a loaded model"):
        load_model(tiny, **settings)


def test_a_chat_template_is_used_and_leaves_the_callers_tokenizer_alone(tiny, tmp_path):
    template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    (tmp_path / "template.jinja").write_text(template)
    before = tiny.tokenizer.chat_template
    for given in (template, tmp_path / "template.jinja", str(tmp_path / "template.jinja")):
        lm = load_model(tiny, chat_template=given)
        assert lm.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi]"
        assert lm.tokenizer("hi")["input_ids"] == tiny.tokenizer("hi")["input_ids"]
        assert lm.provenance["chat_template_sha256"] != tiny.provenance["chat_template_sha256"]
    assert tiny.tokenizer.chat_template == before
    with pytest.raises(InputError, match="chat_template: expected a Jinja template or a file"):
        load_model(tiny, chat_template=tmp_path / "gone.jinja")
    (tmp_path / "weights.jinja").write_bytes(b"\xc0\xff")
    with pytest.raises(InputError, match=r"chat_template: expected text in UTF-8, received .*weights.jinja"):
        load_model(tiny, chat_template=tmp_path / "weights.jinja")


def test_places_that_hold_no_model_are_errors(tmp_path):
    with pytest.raises(InputError, match=r"source: expected a built-in name .*'no such model'; check the path"):
        load_model("no such model")
    with pytest.raises((FetchError, InputError), match=str(tmp_path)):
        load_model(tmp_path)


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that cannot be reached, and what it was asked for."""
    from huggingface_hub import file_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def refuse(*_args, **kwargs):
        asked.append(kwargs.get("repo_id"))
        raise LocalEntryNotFoundError("cannot find the requested files in the local cache")

    monkeypatch.setattr(file_download, "_hf_hub_download_to_cache_dir", refuse)
    return asked


def test_what_looks_like_a_path_is_not_asked_of_the_hub(tiny, tmp_path, monkeypatch, no_hub):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "gone", "./gone", "/gone", "~/gone/x", "a/b/c", "x.gguf", "a/x.safetensors", "runs/nope"):
        for load in (
            lambda place: load_model(place),
            lambda place: load_model(tiny, tokenizer=place),
            lambda place: load_model(tiny, adapter=place),
            lambda place: load_model("nobody/nothing", adapter={"a": place}),
        ):
            with pytest.raises(InputError, match=r"expected a file or folder that exists, received '.*', and there is"):
                load(place)
    assert no_hub == []
    assert tiny.adapters == ()


def test_an_unreachable_hub_is_told_from_a_missing_folder(tiny, no_hub):
    both = "expected a file or folder .*'nobody/nothing'; there is no such file or folder, and the hub could not be"
    for name, load in (
        ("source", lambda place: load_model(place)),
        ("tokenizer", lambda place: load_model(tiny, tokenizer=place)),
        ("adapter", lambda place: load_model(tiny, adapter=place)),
    ):
        with pytest.raises(FetchError, match=f"{name}: {both}"):
            load("nobody/nothing")
    assert set(no_hub) == {"nobody/nothing"}


@pytest.mark.parametrize("dtype", ["fp99", "float32", torch.int8, None])
def test_other_dtypes_are_errors(folder, dtype):
    with pytest.raises(InputError, match=r"dtype: expected 'auto' or one such as torch.bfloat16, received"):
        inspect.unwrap(load_model)(folder, dtype=dtype)  # as users run it, without the type checker of the tests


def test_a_model_without_an_output_layer_is_an_error(tiny, tokenizer):
    with pytest.raises(InputError, match=r"source: .*received a LlamaModel, .*AutoModelForCausalLM"):
        load_model(tiny.model.model, tokenizer=tokenizer)


def test_a_tuned_model_must_have_a_row_for_every_token_id(tiny, make_tiny):
    n_ids = len(tiny.tokenizer)
    padded = make_tiny("llama", vocab_size=n_ids + 4)
    with pytest.raises(InputError, match=f"tuned: expected a vocabulary of {n_ids} rows.*received {n_ids - 4}"):
        check_pair(tiny, make_tiny("llama", vocab_size=n_ids - 4))
    with pytest.warns(SaetoolsWarning, match=f"vocabulary rows: {n_ids + 4} against {n_ids}"):
        check_pair(padded, tiny)


def test_unknown_architectures_are_errors_before_weights_are_read(folder, tmp_path):
    from transformers import BloomConfig

    BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1).save_pretrained(tmp_path / "bloom")
    with pytest.raises(InputError, match=r"families gemma.*received model_type 'bloom'"):
        load_model(tmp_path / "bloom")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    with pytest.raises(InputError, match=r"source: expected files that transformers can read.*nonsense"):
        load_model(folder)


def test_missing_or_damaged_weights_are_errors(folder):
    from safetensors.torch import load_file, save_file

    whole = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for weights in (
        {key: value for key, value in whole.items() if key != name},
        whole | {name: torch.zeros(3, 3)},
    ):
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((IntegrityError, InputError), match=r"tiny-llama.*(up_proj|mismatch)"):
            load_model(folder)
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(IntegrityError, match="tiny-llama"):
        load_model(folder)


def test_quantization_needs_bitsandbytes(folder, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    for quantization in ("8bit", "4bit"):
        with pytest.raises(
            InputError, match=r"quantization: expected bitsandbytes to be installed.*pip install bitsandbytes"
        ):
            load_model(folder, quantization=quantization)


def test_a_gated_model_names_its_licence_page_and_the_token(monkeypatch, tiny):
    import httpx
    import peft
    import transformers
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_args, **_kwargs):
        request = httpx.Request("GET", "https://huggingface.co/google/gemma-3-1b-it/resolve/main/config.json")
        try:
            raise GatedRepoError("Access to this model is restricted", response=httpx.Response(403, request=request))
        except GatedRepoError as error:
            raise OSError("You are trying to access a gated repo.") from error

    message = r"google/gemma-3-1b-it is gated: .*https://huggingface.co/google/gemma-3-1b-it and set HF_TOKEN"
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(FetchError, match=message):
        load_model("google/gemma-3-1b-it")
    monkeypatch.setattr(peft.PeftModel, "from_pretrained", refuse)
    with pytest.raises(FetchError, match=message):
        load_model(tiny, adapter="google/gemma-3-1b-it")


def test_bars_and_verbosity_are_as_before_after_loading(folder):
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    load_model(folder)
    with pytest.raises(InputError):
        load_model(folder / "gone")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()) == before
