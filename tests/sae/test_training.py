"""The training loop: what it learns, what it writes, and that a killed run ends in the same bytes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from planted import D_MODEL, Planted
from safetensors.torch import load_file

from saetools.activations import HarvestConfig, StoredActivations, harvest
from saetools.data import Conversation, load_voices, tokenize
from saetools.errors import InputError, IntegrityError, NonFiniteError, ResourceError
from saetools.models import LanguageModel, Site
from saetools.sae import (
    BatchTopKLoss,
    GatedLoss,
    JumpReLULoss,
    MatryoshkaLoss,
    Progress,
    SAEMetadata,
    StandardLoss,
    TopKLoss,
    TrainConfig,
    TrainRun,
    load_sae,
    objective,
    train_sae,
    train_saes,
    trainer,
)
from saetools.sae.loss import topk_step

QUICK = TrainConfig(
    d_sae=48,
    loss=TopKLoss(k=3),
    n_tokens=40 * 64,
    batch_size=64,
    warmup_steps=5,
    checkpoint_every=7,
    log_every=1,
    lr=2e-3,
)
"""40 steps over three epochs."""

WEIGHTS = "sae_weights.safetensors"


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted quick run."""
    folder = tmp_path_factory.mktemp("finished")
    train_sae(Planted(), QUICK, folder)
    return folder


# What it learns


def test_planted_features_are_found(tmp_path: Path):
    config = TrainConfig(
        d_sae=72,
        loss=TopKLoss(k=3, k_aux=16),
        n_tokens=1500 * 256,
        batch_size=256,
        lr=3e-3,
        warmup_steps=50,
        dead_after_tokens=20_000,
    )
    source = Planted()
    sae = train_sae(source, config, tmp_path)
    cosines = (source.directions @ sae.directions().T).max(1).values
    assert cosines.mean() > 0.9
    x = source.draw(2000, seed=12345)
    fvu = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu < 0.1
    assert log_of(tmp_path)[-1]["fvu"] == pytest.approx(float(fvu), abs=0.03)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(72))


def test_auxiliary_loss_revives_dead_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    initialise = trainer._initialise

    def with_dead(*args: Any) -> Any:
        state = initialise(*args)
        state.weights.encoder[:40] *= 0.1  # these hardly ever come into the top k by themselves
        state.weights.b_enc[40:] = 2.0
        return state

    monkeypatch.setattr(trainer, "_initialise", with_dead)
    base = dataclasses.replace(QUICK, n_tokens=300 * 64, dead_after_tokens=1000, lr=0.01, log_every=10)
    dead = {}
    for coefficient in (0.0, 1 / 4):
        folder = tmp_path / str(coefficient)
        train_sae(
            Planted(), dataclasses.replace(base, loss=TopKLoss(k=3, k_aux=16, aux_coefficient=coefficient)), folder
        )
        dead[coefficient] = log_of(folder)[-1]["dead"]
    assert dead[0.0] > 0.7
    assert dead[1 / 4] < 0.3


# What it writes


def test_scale_and_centre_are_folded_into_the_saved_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    states = []
    fold = trainer._fold
    monkeypatch.setattr(trainer, "_fold", lambda state, *rest: states.append(state) or fold(state, *rest))
    sae = train_sae(Planted(), QUICK, tmp_path)
    (state,) = states
    x = Planted().draw(100, seed=5)
    assert (x * state.scale).norm(dim=1).mean() == pytest.approx(math.sqrt(D_MODEL), rel=0.05)
    scaled = topk_step(x * state.scale, state.weights, QUICK.loss.k)
    latents = sae.encode(x)
    assert torch.equal(latents.to_dense() > 0, torch.zeros(100, 48).scatter_(1, scaled.indices, scaled.values) > 0)
    sums = torch.zeros(48).index_add_(0, scaled.indices.flatten(), scaled.values.flatten())
    sums *= state.weights.W_dec.norm(dim=1)  # whose length the saved rows have lost
    torch.testing.assert_close(latents.sums() * state.scale, sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x) * state.scale, x * state.scale - scaled.error, rtol=1e-4, atol=1e-4)
    assert sae.metadata.median_norm == pytest.approx(float(x.norm(dim=1).median()), rel=0.1)


def test_result_and_log(finished: Path):
    sae = load_sae(finished)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
    assert sae.metadata.provenance["train"] == QUICK.as_json()
    log = log_of(finished)
    assert [line["step"] for line in log] == list(range(1, 41))
    assert log[-1]["fvu"] < log[0]["fvu"]
    assert all(0 < line["l0"] <= 3 and line["n_steps"] == 40 and line["tokens_per_second"] > 0 for line in log)
    rates = [line["lr"] for line in log]
    assert rates[:5] == pytest.approx([QUICK.lr * step / 5 for step in range(1, 6)])
    assert rates[5:29] == pytest.approx([QUICK.lr] * 24)
    assert rates[28:] == pytest.approx([QUICK.lr * left / 12 for left in range(12, 0, -1)])


def test_log_counts_fvu_l0_and_outliers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class WithOutliers(Planted):
        def draw(self, n_tokens: int, seed: int) -> torch.Tensor:
            x = super().draw(n_tokens, seed)
            x[::16] *= 1000
            return x

    steps = []
    step = objective.topk_step

    def spy(x: torch.Tensor, *args: Any, **settings: Any) -> Any:
        result = step(x, *args, **settings)
        steps.append((x, result.error.clone(), result.values.clone()))
        return result

    monkeypatch.setattr(objective, "topk_step", spy)
    config = dataclasses.replace(QUICK, n_tokens=10 * 64, log_every=5)
    sae = train_sae(WithOutliers(), config, tmp_path)
    for line, done in zip(log_of(tmp_path), (steps[:5], steps[5:]), strict=True):
        variance = sum(float((x - x.mean(0)).square().sum()) for x, _, _ in done)
        assert line["fvu"] == pytest.approx(sum(float(e.square().sum()) for _, e, _ in done) / variance, rel=1e-3)
        assert line["l0"] == pytest.approx(sum(float((v > 0).sum()) for _, _, v in done) / (5 * 60))
        assert line["outliers"] == 4 / 64
    assert sae.metadata.median_norm < 300


def test_progress_is_the_log(tmp_path: Path):
    seen: list[Progress] = []
    train_sae(Planted(), QUICK, tmp_path, on_progress=seen.append)
    assert [dataclasses.asdict(progress) for progress in seen] == log_of(tmp_path)


# Resuming


def test_a_killed_run_ends_in_the_same_bytes(finished: Path, tmp_path: Path, kill_midway: Callable[..., list[int]]):
    script, steps = Path(__file__).with_name("planted.py"), []
    for _ in range(2):
        steps += kill_midway(script, str(tmp_path), json.dumps(QUICK.as_json()), last=15)
        assert not (tmp_path / WEIGHTS).exists()
    train_sae(Planted(), QUICK, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes(), f"killed after steps {steps}"
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, 41))
    figures = [{key: line[key] for key in ("fvu", "l0", "dead", "lr")} for line in log_of(tmp_path)]
    assert figures == [{key: line[key] for key in ("fvu", "l0", "dead", "lr")} for line in log_of(finished)]


def interrupt(folder: Path, at_step: int, source: Any = None, **settings: Any) -> None:
    """Train until `at_step`, then break off."""

    def stop(progress: Progress) -> None:
        if progress.step == at_step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sae(source or Planted(), QUICK, folder, on_progress=stop, **settings)


LOSSES = [
    BatchTopKLoss(k=3),
    MatryoshkaLoss(k=3, shares=(0.25, 0.5, 1.0)),
    StandardLoss(sparsity=0.5, target_l0=4.0, sparsity_warmup_steps=10),
    GatedLoss(sparsity=0.5, target_l0=4.0, sparsity_warmup_steps=10),
    JumpReLULoss(target_l0=4.0, sparsity_warmup_steps=10),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_every_kind_goes_on_to_the_same_bytes(tmp_path: Path, loss: Any):
    config = dataclasses.replace(QUICK, loss=loss, decay="cosine", clip_norm=1.0)
    train_sae(Planted(), config, tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if progress.step == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sae(Planted(), config, tmp_path / "parts", on_progress=stop)
    train_sae(Planted(), config, tmp_path / "parts")
    assert (tmp_path / "parts" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert load_sae(tmp_path / "parts").metadata.provenance["train"]["loss"]["kind"] == type(loss).__name__


@pytest.mark.parametrize("step", [1, 7, 16, 17, 39, 40])
def test_an_interrupted_run_ends_in_the_same_bytes(finished: Path, tmp_path: Path, step: int):
    interrupt(tmp_path, step)
    with (tmp_path / "train.jsonl").open("a") as log:
        log.write('{"step": 4')  # a line cut short
    train_sae(Planted(), QUICK, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, 41))


def test_a_finished_run_is_not_done_again(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = (finished / WEIGHTS).read_bytes()
    monkeypatch.setattr(objective, "topk_step", None)
    train_sae(Planted(), QUICK, finished)
    assert (finished / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "metadata", "source", "words"),
    [
        ({"lr": 1e-3, "loss": TopKLoss(k=2)}, {}, Planted(), "where loss, lr differ"),
        ({}, {"site": "blocks.1.hook_resid_post"}, Planted(), "where site differ"),
        ({}, {"model_name": "other"}, Planted(), "where model_name differ"),
        ({}, {"provenance": {"activations": {"data_sha256": "other"}}}, Planted(), "where activations differ"),
        ({}, {}, Planted(n_batches_=9), "where steps_per_epoch differ"),
    ],
)
def test_a_folder_of_another_run(
    tmp_path: Path, changes: dict[str, Any], metadata: dict[str, Any], source: Planted, words: str
):
    interrupt(tmp_path, 8)
    with pytest.raises(InputError, match=f"equal settings, received .*{words}"):
        train_sae(source, dataclasses.replace(QUICK, **changes), tmp_path, metadata=SAEMetadata(**metadata))


def test_a_damaged_checkpoint(tmp_path: Path):
    interrupt(tmp_path, 8)
    file = tmp_path / "checkpoint.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-100], b"", whole.replace(b'"scale"', b'"skale"')):
        file.write_bytes(damaged)
        with pytest.raises(IntegrityError, match=r"is damaged .*; delete it to start again"):
            train_sae(Planted(), QUICK, tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(finished: Path, tmp_path: Path, small_files: Callable[[int], Any]):
    interrupt(tmp_path, 8)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with (
        small_files(10_000),
        pytest.raises(ResourceError, match=r"no disk space for a checkpoint in .*; the last one stands. Free some"),
    ):
        train_sae(Planted(), QUICK, tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))
    train_sae(Planted(), QUICK, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


def test_too_little_memory(tmp_path: Path):
    with pytest.raises(ResourceError, match=r"not enough memory for training; the last checkpoint stands. Lower"):
        train_sae(Planted(), dataclasses.replace(QUICK, d_sae=2**44), tmp_path)


def test_a_shard_that_vanishes(smollm: LanguageModel, tmp_path: Path):
    texts = list(tokenize([Conversation(text=pair.neutral) for pair in load_voices()[:40]], smollm.tokenizer))
    store = harvest(smollm, [Site(1)], texts, tmp_path / "store", config=HarvestConfig(shard_tokens=200))
    config = dataclasses.replace(QUICK, n_tokens=4 * len(store), checkpoint_every=2)
    source = StoredActivations(store, pool_shards=2).at(Site(1))
    shard = tmp_path / "store" / "shard-00001.safetensors"
    whole = shard.read_bytes()

    def lose(progress: Progress) -> None:
        if progress.step == 2 * (len(store) // 64) - 5:  # near the end of the second epoch
            shard.unlink()

    with pytest.raises(IntegrityError, match=r"cannot read .*shard-00001.safetensors .*; harvest again"):
        train_sae(source, config, tmp_path / "sae", on_progress=lose)
    assert (tmp_path / "sae" / "checkpoint.safetensors").is_file()
    shard.write_bytes(whole)
    assert train_sae(source, config, tmp_path / "sae").d_sae == 48


# Several SAEs in one pass


class TwoSites:
    """Planted activations at one site, other ones at another."""

    sources: ClassVar = {Site(0): Planted(), Site(1): Planted(n_active=2)}

    def n_batches(self, batch_size: int) -> int:
        return Planted().n_batches(batch_size)

    def epoch_batches(self, batch_size: int, **place: Any) -> Iterator[dict[Site, torch.Tensor]]:
        batches = [source.epoch_batches(batch_size, **place) for source in self.sources.values()]
        for one, other in zip(*batches, strict=True):
            yield {Site(0): one, Site(1): other}

    def sample(self, n_tokens: int, *, seed: int) -> dict[Site, torch.Tensor]:
        return {site: source.sample(n_tokens, seed=seed) for site, source in self.sources.items()}


def several(folder: Path) -> list[TrainRun]:
    """Other widths, kinds, seeds and sites."""
    configs = [
        (QUICK, Site(0)),
        (dataclasses.replace(QUICK, d_sae=96, seed=5), Site(0)),
        (dataclasses.replace(QUICK, loss=BatchTopKLoss(k=4), checkpoint_every=11), Site(1)),
    ]
    return [TrainRun(config, folder / str(index), site) for index, (config, site) in enumerate(configs)]


def test_each_of_several_ends_in_the_bytes_of_one_alone(tmp_path: Path):
    together, alone = several(tmp_path / "together"), several(tmp_path / "alone")
    seen: list[int] = []
    saes = train_saes(TwoSites(), together, on_progress=lambda index, progress: seen.append(index))
    assert sorted(seen) == [0] * 40 + [1] * 40 + [2] * 40
    assert [sae.d_sae for sae in saes] == [48, 96, 48]
    assert [sae.metadata.site for sae in saes] == [str(run.site) for run in together]
    for run, other in zip(together, alone, strict=True):
        train_sae(TwoSites.sources[run.site], run.config, other.out)
        assert (Path(run.out) / WEIGHTS).read_bytes() == (Path(other.out) / WEIGHTS).read_bytes()


def test_several_go_on_from_their_own_checkpoints(tmp_path: Path):
    def stop(index: int, progress: Progress) -> None:
        if progress.step == 24 and index == 1:
            raise KeyboardInterrupt

    runs = several(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        train_saes(TwoSites(), runs, on_progress=stop)
    train_saes(TwoSites(), runs)
    train_saes(TwoSites(), several(tmp_path / "whole"))
    for run in runs:
        name = Path(run.out).name
        assert (tmp_path / "parts" / name / WEIGHTS).read_bytes() == (tmp_path / "whole" / name / WEIGHTS).read_bytes()
        assert [line["step"] for line in log_of(Path(run.out))] == list(range(1, 41))


def test_several_that_do_not_go_together(tmp_path: Path):
    one, *_ = several(tmp_path)
    for name, value in (("batch_size", 32), ("n_tokens", 640), ("data_seed", 1)):
        other = dataclasses.replace(one, out=tmp_path / "x", config=dataclasses.replace(QUICK, **{name: value}))
        with pytest.raises(InputError, match=f"runs: expected equal {name}, .* received .*, {value}"):
            train_saes(TwoSites(), [one, other])
    with pytest.raises(InputError, match="runs: expected a folder for each"):
        train_saes(TwoSites(), [one, one])
    with pytest.raises(InputError, match="runs: expected at least one"):
        train_saes(TwoSites(), [])


# What cannot be trained


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_activations_that_are_not_finite(finished: Path, tmp_path: Path, bad: float):
    class Spoilt(Planted):
        def draw(self, n_tokens: int, seed: int) -> torch.Tensor:
            x = super().draw(n_tokens, seed)
            if seed == 1002:  # the third batch of the second epoch
                x[3, 5] = bad
            return x

    with pytest.raises(
        NonFiniteError, match=r"activations are not finite at step 18; the last checkpoint in .* stands"
    ):
        train_sae(Spoilt(), QUICK, tmp_path)
    assert len(load_file(tmp_path / "checkpoint.safetensors")) == 15
    train_sae(Planted(), QUICK, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


def test_a_sample_that_is_not_finite(tmp_path: Path):
    class Spoilt(Planted):
        def sample(self, n_tokens: int, *, seed: int) -> torch.Tensor:
            return super().sample(n_tokens, seed=seed) * torch.nan

    with pytest.raises(NonFiniteError, match="not finite in the sample"):
        train_sae(Spoilt(), QUICK, tmp_path)


def test_a_loss_that_is_not_finite(tmp_path: Path):
    with pytest.raises(NonFiniteError, match=r"the loss is not finite at step .*Lower lr"):
        train_sae(Planted(), dataclasses.replace(QUICK, lr=1e30), tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 10_000}, "config.batch_size: expected at most"),
        ({"n_tokens": 10}, "config.batch_size: expected at most"),
        ({"batch_size": 0}, "config.batch_size: expected a finite number above 0"),
        ({"log_every": 0}, "config.log_every: expected a finite number above 0"),
        ({"checkpoint_every": 0}, "config.checkpoint_every: expected"),
        ({"outlier_factor": 0.0}, "config.outlier_factor: expected"),
        ({"lr": math.nan}, "config.lr: expected a finite number above 0, received nan"),
        ({"decay_fraction": 2.0}, "config.decay_fraction: expected 0 to 1"),
        ({"clip_norm": 0.0}, "config.clip_norm: expected more than 0"),
        ({"clip_norm": -1.0}, "config.clip_norm: expected more than 0"),
        ({"encode_dtype": "float16"}, "config.encode_dtype: expected float32 or bfloat16 or int8 for TopK"),
        ({"encode_dtype": "int8", "loss": BatchTopKLoss(k=3)}, "expected float32 or bfloat16 for BatchTopKLoss"),
        ({"loss": TopKLoss(k=49)}, "loss.k: expected 1 to d_sae = 48, received 49"),
        ({"loss": MatryoshkaLoss(k=3, shares=(0.5, 0.25, 1.0))}, "loss.shares: expected ascending shares"),
        ({"loss": MatryoshkaLoss(k=3, shares=(0.5,))}, "loss.shares: expected ascending shares"),
        ({"loss": StandardLoss(sparsity=0.0)}, "loss.sparsity: expected more than 0"),
        ({"loss": GatedLoss(target_l0=48.0)}, "loss.target_l0: expected more than 0, below 48"),
        ({"loss": JumpReLULoss(sparsity_warmup_steps=0)}, "loss.sparsity_warmup_steps: expected 1 or more"),
    ],
)
def test_impossible_settings(tmp_path: Path, changes: dict[str, Any], words: str):
    with pytest.raises(InputError, match=words):
        train_sae(Planted(), dataclasses.replace(QUICK, **changes), tmp_path)


@pytest.mark.parametrize("encode_dtype", ["float32", "int8"])
def test_encode_dtypes_learn_alike(finished: Path, tmp_path: Path, encode_dtype: str):
    train_sae(Planted(), dataclasses.replace(QUICK, encode_dtype=encode_dtype), tmp_path)
    assert log_of(tmp_path)[-1]["fvu"] == pytest.approx(log_of(finished)[-1]["fvu"], rel=0.05)
