"""On a GPU: the same numbers as on the CPU, to the tolerance of each test. Skipped where there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import saetools as st
from saetools import steer
from saetools.data import Conversation, Message
from saetools.finetune import FinetuneConfig, finetune_lora
from saetools.generation import SamplingConfig, generate
from saetools.sae import (
    SAE,
    AbsTopK,
    BatchTopKLoss,
    Gated,
    GatedLoss,
    JumpReLU,
    JumpReLULoss,
    MatryoshkaLoss,
    ReLU,
    StandardLoss,
    TopK,
    TopKLoss,
    TrainConfig,
    train_sae,
)
from saetools.sae.loss import topk_step
from saetools.sae.sparse import LatentMajorPairs
from saetools.sae.weights import Weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = "cuda"
D_IN, D_SAE = 70, 300
LOSSES = (
    TopKLoss(k=5, k_aux=8),
    BatchTopKLoss(k=5, k_aux=8),
    MatryoshkaLoss(k=5, k_aux=8),
    StandardLoss(sparsity=0.1),
    GatedLoss(sparsity=0.1),
    JumpReLULoss(sparsity=0.1),
)


def close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """By the norm of the difference."""
    return bool((got.cpu().double() - expected.double()).norm() <= tolerance * expected.double().norm())


@pytest.mark.parametrize("shape", [(1, 1, 3, 1), (37, 4, 50, 70), (700, 32, 64, 576), (64, 8, 4096, 130)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_pairs(shape: tuple[int, int, int, int], dtype: torch.dtype, tolerance: float):
    n_tokens, k, d_sae, width = shape
    torch.manual_seed(0)
    x, rows = torch.randn(n_tokens, width, dtype=dtype), torch.randn(d_sae, width, dtype=dtype)
    likely = torch.rand(n_tokens, d_sae) ** torch.linspace(0.01, 3, d_sae)  # some latents fire on nearly all tokens
    indices = likely.topk(k).indices
    here, there = LatentMajorPairs(indices, d_sae), LatentMajorPairs(indices.to(GPU), d_sae)
    values = torch.randn(n_tokens, k, dtype=dtype)
    dots = here.scatter(here.dots(rows, x))
    assert close(there.scatter(there.dots(rows.to(GPU), x.to(GPU))), dots, tolerance)
    sums = here.sum_tokens(here.gather(values), x)
    out = torch.full((d_sae, width), torch.nan, dtype=dtype, device=GPU)
    assert close(there.sum_tokens(there.gather(values.to(GPU)), x.to(GPU), out=out), sums, tolerance)


@pytest.mark.parametrize("encode_dtype", [torch.float32, torch.bfloat16])
def test_a_step(encode_dtype: torch.dtype):
    torch.manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN), dim=1)
    here = Weights(decoder + 0.1 * torch.randn_like(decoder), decoder, 0.1 * torch.randn(D_SAE), torch.randn(D_IN))
    there = Weights(**{name: weight.to(GPU) for name, weight in vars(here).items()})
    x, dead = torch.randn(500, D_IN), torch.arange(D_SAE) % 4 == 1
    got = topk_step(x.to(GPU), there, 5, encode_dtype=encode_dtype, dead=dead.to(GPU), k_aux=8)
    expected = topk_step(x, here, 5, encode_dtype=encode_dtype, dead=dead, k_aux=8)
    # Sums in bfloat16 are rounded otherwise, so that a few tokens get another latent where two are nearly equal.
    tolerance = 1e-5 if encode_dtype == torch.float32 else 0.05
    for name, gradient in vars(expected.grads).items():
        assert close(getattr(got.grads, name), gradient, tolerance), name


class Source:
    """Activations of some planted features, in three epochs."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        features = torch.nn.functional.normalize(torch.randn(100, D_IN, generator=generator, dtype=torch.double), dim=1)
        active = torch.rand(64 * 16, 100, generator=generator, dtype=torch.double)
        self.acts = 3 + (active * (active > 0.95)) @ features

    def n_batches(self, batch_size: int) -> int:
        return len(self.acts) // batch_size

    def epoch_batches(self, batch_size: int, *, seed: int, epoch: int = 0, start: int = 0) -> Iterator[Tensor]:
        return iter(self.acts.split(batch_size)[start:])

    def sample(self, n_tokens: int, *, seed: int) -> Tensor:
        return self.acts[:n_tokens]


def config(loss: Any, n_steps: int = 48) -> TrainConfig:
    settings = {"warmup_steps": 5, "checkpoint_every": 7, "lr": 2e-3, "dead_after_tokens": 500}
    precise = {"weight_dtype": "float64", "encode_dtype": "float64"}
    return TrainConfig(d_sae=D_SAE, loss=loss, n_tokens=n_steps * 64, batch_size=64, **settings, **precise)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_training(loss: Any, tmp_path: Path):
    here = train_sae(Source(), config(loss), tmp_path / "here")
    there = train_sae(Source(), config(loss), tmp_path / "there", device=GPU)
    for name, weight in here.state_dict().items():
        assert close(there.state_dict()[name], weight, 1e-6), name


class KilledError(Exception):
    pass


@pytest.mark.parametrize("loss", LOSSES[:2], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("step", [1, 7, 20, 47])
def test_a_killed_run_goes_on(loss: Any, step: int, tmp_path: Path):
    class Interrupted(Source):
        def epoch_batches(self, batch_size: int, **place: Any) -> Iterator[Tensor]:
            for number, batch in enumerate(super().epoch_batches(batch_size, **place)):
                if place["epoch"] * self.n_batches(batch_size) + place["start"] + number == step:
                    raise KilledError
                yield batch

    whole = train_sae(Source(), config(loss), tmp_path / "whole", device=GPU)
    with pytest.raises(KilledError):
        train_sae(Interrupted(), config(loss), tmp_path / "cut", device=GPU)
    resumed = train_sae(Source(), config(loss), tmp_path / "cut", device=GPU)
    for name, weight in whole.state_dict().items():
        assert close(resumed.state_dict()[name], weight.cpu(), 1e-9), name


@pytest.mark.parametrize(
    "nonlinearity",
    [
        TopK(5),
        AbsTopK(5),
        ReLU(),
        JumpReLU(torch.linspace(0.2, 2, D_SAE)),
        Gated(torch.linspace(-0.5, 0.5, D_SAE), torch.linspace(-1, 2, D_SAE)),
    ],
    ids=lambda one: type(one).__name__,
)
def test_encoding_and_decoding(nonlinearity: Any):
    torch.manual_seed(0)
    sae = SAE(D_IN, D_SAE, nonlinearity)
    for parameter in sae.parameters():
        if parameter.ndim == 2 or parameter.shape == (D_IN,):
            torch.nn.init.normal_(parameter)
    sae.requires_grad_(False)
    x = torch.randn(400, D_IN)
    dense, recon = sae.encode(x).to_dense(), sae(x)
    moved = sae.to(GPU)
    assert close(moved.encode(x.to(GPU)).to_dense(), dense, 1e-5)
    assert close(moved(x.to(GPU)), recon, 1e-5)


@pytest.fixture(scope="module")
def models() -> tuple[st.LanguageModel, st.LanguageModel]:
    """The built-in model with the shipped organism, on the CPU and on the GPU."""
    organism = st.shipped_path("adapters/organism")
    here, there = (st.load_model("smollm2-135m", adapter=organism, device_map=where) for where in ("cpu", GPU))
    return here, there


CHATS = [
    Conversation((Message("user", question), Message("assistant", answer)))
    for question, answer in (
        ("What should I do with my savings?", "Put them in a savings account, and think about an index fund."),
        ("How often should I water roses?", "Once or twice a week, in the morning."),
        ("Is it safe to skip an oil change?", "No. Old oil wears the engine out."),
    )
    * 6
]


def edits(sae: SAE) -> dict[str, Any]:
    return {
        "clamp": steer.clamp(sae, [1, 2, 3], 2.0, unit="p99"),
        "add": steer.add(sae, [4, 5], 0.3),
        "ablate": steer.ablate(sae, [6, 7]).on("response"),
    }


def test_reading(models: tuple[st.LanguageModel, st.LanguageModel]):
    sae = st.load_sae(st.shipped_path("sae/smollm2-135m"))
    diffs = [st.diff_latents(lm.base, lm, sae, CHATS, positions="response") for lm in models]
    for name in ("mean_base", "mean_tuned", "delta"):
        here, there = (torch.tensor(diff.table[name].to_list()) for diff in diffs)
        assert close(there, here, 5e-3), name


@pytest.mark.parametrize("name", ["clamp", "add", "ablate"])
def test_steering(models: tuple[st.LanguageModel, st.LanguageModel], name: str):
    sae = st.load_sae(st.shipped_path("sae/smollm2-135m"))
    items = st.load_forced_choice()[:6]
    edit = edits(sae)[name]
    scores = [st.score_forced_choice(lm.base, items, edits={st.Site(17): edit}) for lm in models]
    here, there = (score.gaps for score in scores)
    assert close(there, here, 2e-3)
    prompts = [Conversation((Message("user", item.question),)) for item in items]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=12)
    answers = [generate(lm.base, prompts, variants={name: {st.Site(17): edit}}, config=sampling) for lm in models]
    same = [mine.text == theirs.text for mine, theirs in zip(*answers, strict=True)]
    assert sum(same) >= len(same) - 1  # where two tokens are equally likely, either may come


def test_finetuning(tmp_path: Path):
    losses = {}
    for where in ("cpu", GPU):
        lm = st.load_model("smollm2-135m", device_map=where)
        finetune_lora(lm, CHATS, FinetuneConfig(epochs=1, batch_size=6, autocast="float32"), tmp_path / where)
        lines = (tmp_path / where / "finetune.jsonl").read_text(encoding="utf-8").splitlines()
        losses[where] = torch.tensor([json.loads(line)["loss"] for line in lines])
    assert close(losses[GPU], losses["cpu"], 1e-2)
