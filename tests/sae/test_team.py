"""Several processes that train one SAE: the same weights as one process, and one clear end when one of them fails."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planted import Planted
from safetensors.torch import load_file
from team_worker import RUNS

from saetools.errors import InputError
from saetools.sae import MatryoshkaLoss, StandardLoss, TopKLoss, TrainConfig, train_sae
from saetools.sae.objective import AnyLoss

HERE = Path(__file__).parent


def torchrun(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, str(HERE / script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder with a run that ended at its second checkpoint for want of disk space, and what was said of it."""
    folder = tmp_path_factory.mktemp("together")
    return folder, torchrun("team_worker.py", str(folder), "topk-latents")


@pytest.fixture(scope="module")
def together(broken_off: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    """Every run, by two processes; one of them goes on where it was broken off."""
    folder, _ = broken_off
    done = torchrun("team_worker.py", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_full_disk_ends_all_processes_and_leaves_the_last_checkpoint(
    broken_off: tuple[Path, subprocess.CompletedProcess[str]],
):
    folder, done = broken_off
    assert done.returncode != 0
    assert "ResourceError: no disk space for a checkpoint in" in done.stderr
    assert "another process of this run has failed" in done.stderr
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_one_does(together: Path, tmp_path: Path, name: str):
    train_sae(Planted(), dataclasses.replace(RUNS[name], shard_latents=False), tmp_path)
    alone, both = (load_file(folder / "checkpoint.safetensors") for folder in (tmp_path, together / name))
    assert alone.keys() == both.keys()
    logs = [(folder / "train.jsonl").read_text().splitlines() for folder in (tmp_path, together / name)]
    if "float32" in name:
        fvu = [[json.loads(line)["fvu"] for line in log] for log in logs]
        assert fvu[1] == pytest.approx(fvu[0], rel=1e-3)
        return
    for key, value in alone.items():
        torch.testing.assert_close(both[key], value, rtol=1e-9, atol=1e-9)
    for one, two in zip(*logs, strict=True):
        figures = [{key: json.loads(line)[key] for key in ("step", "fvu", "l0", "dead", "lr")} for line in (one, two)]
        assert figures[1] == pytest.approx(figures[0], rel=1e-9)


def test_latents_are_revived_in_these_runs(together: Path):
    log = (together / "topk-tokens" / "train.jsonl").read_text().splitlines()
    assert max(json.loads(line)["dead"] for line in log) > 0.1


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (StandardLoss(), "config.shard_latents: expected TopKLoss, BatchTopKLoss or MatryoshkaLoss.*StandardLoss"),
        (TopKLoss(k=30), "config.shard_latents: expected at least k = 30 of 48 latents.*received 2 processes"),
        (
            MatryoshkaLoss(k=3, shares=(0.02, 1.0)),
            "config.shard_latents: expected at least k = 3 of 48 latents, and one",
        ),
    ],
)
def test_latents_that_cannot_be_divided(loss: AnyLoss, words: str):
    with pytest.raises(InputError, match=words):
        TrainConfig(d_sae=48, loss=loss, shard_latents=True).check(device="cpu", n_processes=2)
