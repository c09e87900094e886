"""Fixtures for all tests: checked shapes, the built-in model, tiny random models of every family."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub: tests fetch nothing from hubs

import pytest
import torch
from jaxtyping import install_import_hook

# Must come before the first import of saetools: checks the annotated shapes and types of every function that is called.
install_import_hook("saetools", "beartype.beartype")

from saetools.models import STREAMS, LanguageModel, Site, load_model  # noqa: E402

torch.set_num_threads(1)

D_MODEL = 32
N_LAYERS = 3
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_COMMON = {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4, "intermediate_size": 48}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", _GROUPED),
    "smollm3": ("smollm3", _GROUPED),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", _GROUPED),
    "gemma": ("gemma", _GROUPED),
    "gemma2": ("gemma2", {**_GROUPED, "sliding_window": 8}),
    "gemma3_text": ("gemma3_text", {**_GROUPED, "sliding_window": 8, "final_logit_softcapping": 5.0}),
    "gemma3": (
        "gemma3",
        {
            "text_config": {**_GROUPED, "sliding_window": 8, "vocab_size": 260},
            "vision_config": {**_COMMON, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
        },
    ),
    "gpt2": ("gpt2", {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("gpt_neox", {**_COMMON, "use_parallel_residual": False}),
    "gpt_neox_parallel": ("gpt_neox", {**_COMMON, "use_parallel_residual": True}),
}
"""What tests call a family: its model type and a small config."""


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Byte-level BPE with one merge (`th`) and ChatML; reloaded, so that it has the path that TransformerLens reads."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, "th"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(
        [AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    fast.chat_template = CHATML
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def make_tiny(tokenizer: Any) -> Callable[..., LanguageModel]:
    """`make_tiny(family, **config)`: a new random model of a family; the same weights for the same arguments."""

    def make(family: str, **overrides: Any) -> LanguageModel:
        from transformers import AutoConfig, AutoModelForCausalLM

        kind, settings = FAMILIES[family]
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
        config = AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), **ids, **settings, **overrides})
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():  # norms and biases too: nothing may hide behind ones and zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.config.architectures = [type(model).__name__]  # as in every saved config
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return load_model(model, tokenizer=tokenizer)

    return make


@pytest.fixture
def tiny(make_tiny: Callable[..., LanguageModel]) -> LanguageModel:
    """A tiny Llama."""
    return make_tiny("llama")


@pytest.fixture(scope="session")
def smollm() -> LanguageModel:
    """The built-in model; the first run on a machine fetches and converts it."""
    return load_model("smollm2-135m")


@pytest.fixture(scope="session", params=FAMILIES)
def family_lm(request: pytest.FixtureRequest, make_tiny: Callable[..., LanguageModel]) -> LanguageModel:
    """A tiny model of every family in turn, shared: tests leave it as it was."""
    return make_tiny(request.param)


@pytest.fixture(scope="session")
def family_sites(family_lm: LanguageModel) -> list[Site]:
    """Every site that `family_lm` has, in order."""
    parallel = getattr(family_lm.model.config, "use_parallel_residual", False)
    streams = [stream for stream in STREAMS if not (parallel and stream == "resid_mid")]
    return [Site(layer, stream) for layer in range(N_LAYERS) for stream in streams]


@pytest.fixture
def small_files() -> Callable[[int], Any]:
    """`with small_files(n): ...`: the system refuses files of more than n bytes, as a full disk does."""

    @contextmanager
    def limit(n_bytes: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture
def kill_midway() -> Callable[..., list[int]]:
    """`kill_midway(script, *args, last=12)`: start a script that counts its pieces of work, and kill it in one.

    After each piece it prints the number of those done and waits for a line. It is killed `within` so many seconds of
    the next piece, after at most `last` of them; what it printed until then is returned.
    """

    def run(script: Path, *args: str, last: int, within: float = 0.005) -> list[int]:
        done = []
        command = [sys.executable, str(script), *args]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for _ in range(random.Random().randint(1, last)):
                done.append(int(process.stdout.readline()))
                process.stdin.write("\n")
                process.stdin.flush()
            time.sleep(random.Random().uniform(0, within))  # also while files are written
            process.kill()
        return done

    return run
