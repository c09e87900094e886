"""The files of a latent store: killed runs, full disks, damage, other stores in the way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_pairs
import torch

from saetools.errors import InputError, IntegrityError, ResourceError
from saetools.latents import LatentStore, merge


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A finished store that a test may damage."""
    random_pairs.write(tmp_path / "store")
    return tmp_path / "store"


def edit_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


# Resuming


def test_a_killed_run_ends_in_the_same_bytes(path: Path, tmp_path: Path, kill_midway: Callable[..., list[int]]):
    stages = json.loads((path / "manifest.json").read_text())["stages"]
    out = tmp_path / "killed"
    kill_midway(Path(random_pairs.__file__), str(out), last=stages - 1, within=0.01)
    with pytest.raises((InputError, IntegrityError), match=r"after \d+ of \d+ stages|holds no manifest"):
        LatentStore(out)
    random_pairs.write(out)
    assert files_of(out) == files_of(path)


def test_every_stage_can_be_the_last_before_a_stop(path: Path, tmp_path: Path):
    out, seen = tmp_path / "stopped", []

    def stop(done: int, total: int) -> None:
        if done not in seen:
            seen.append(done)
            raise KeyboardInterrupt

    while not seen or seen[-1] < json.loads((path / "manifest.json").read_text())["stages"]:
        with pytest.raises(KeyboardInterrupt):
            random_pairs.write(out, on_progress=stop)
    assert files_of(out) == files_of(path)
    assert not list(out.glob("unmerged-*"))


def test_a_finished_store_is_not_written_again(path: Path):
    times = {file: os.stat(file).st_mtime_ns for file in path.iterdir()}
    seen: list[tuple[int, int]] = []
    random_pairs.write(path, on_progress=lambda *done: seen.append(done))
    assert {file: os.stat(file).st_mtime_ns for file in path.iterdir()} == times
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_leftovers_of_a_kill_are_removed(tmp_path: Path):
    half = ("unmerged-00099.0.row_counts.npy", ".0.latent_rows.npy.4711.tmp", ".manifest.json.4711.tmp", "notes.tmp")
    for name in half:
        (tmp_path / name).write_bytes(b"half")
    random_pairs.write(tmp_path)
    assert not list(tmp_path.glob("unmerged-*"))
    assert [file.name for file in tmp_path.glob("*.tmp")] == ["notes.tmp"]


def test_shards_and_buckets_do_not_show(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(merge, "BUCKET_PAIRS", 100)
    random_pairs.write(tmp_path / "other", shard_tokens=10_000)
    ours, theirs = files_of(path), files_of(tmp_path / "other")
    assert {name for name in ours if ours[name] != theirs[name]} == {"manifest.json"}
    assert list(ours) == list(theirs)


def test_a_disk_that_is_full(tmp_path: Path, small_files: Callable[[int], Any], path: Path):
    def fill(done: int, total: int) -> None:
        if done == 3:
            limit.enter_context(small_files(900))

    out = tmp_path / "full"
    with (
        ExitStack() as limit,
        pytest.raises(ResourceError, match=r"no disk space for shard 2 in .*; what was written before stands"),
    ):
        random_pairs.write(out, on_progress=fill)
    assert not list(out.glob(".*.tmp"))
    random_pairs.write(out)
    assert files_of(out) == files_of(path)


# Another store


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": ("tuned", "base")}, "models"),
        ({"provenance": {"sae": "another"}}, "provenance"),
        ({"skip_first": False}, "skip_first"),
        ({"shard_tokens": 50}, "shard_tokens"),
        ({"vocabulary": [*random_pairs.VOCABULARY, b"more"]}, "vocabulary_sha256"),
        ({"directions": torch.eye(random_pairs.D_SAE)}, "directions_sha256"),
        ({"corpus": random_pairs.documents(39)}, "n_documents, n_tokens, data_sha256, roles_sha256, names_sha256"),
    ],
)
def test_a_store_of_something_else(path: Path, changes: dict[str, Any], words: str):
    with pytest.raises(InputError, match=rf"same models, SAE and corpus, received .*differs in {words}; choose"):
        random_pairs.write(path, **changes)


def test_other_versions_may_read_but_not_continue(path: Path):
    edit_manifest(path, versions={"torch": "1.0"})
    random_pairs.write(path)
    edit_manifest(path, done=3)
    with pytest.raises(InputError, match="differs in versions"):
        random_pairs.write(path)


def test_a_folder_of_another_kind(path: Path):
    edit_manifest(path, content="activations")
    for look in (LatentStore, random_pairs.write):
        with pytest.raises(InputError, match=r"a latent store of format 1, received content 'activations' of format 1"):
            look(path)


# Damage


def test_missing_and_truncated_files(path: Path):
    file = path / "1.latent_rows.npy"
    file.write_bytes(file.read_bytes()[:-1])
    for look in (LatentStore, random_pairs.write):
        with pytest.raises(IntegrityError, match=r"1\.latent_rows\.npy is missing or damaged; index again"):
            look(path)
    file.unlink()
    with pytest.raises(IntegrityError, match=r"1\.latent_rows\.npy is missing or damaged"):
        LatentStore(path)


def test_changed_bytes(path: Path):
    LatentStore(path).verify()
    file = path / "0.row_values.npy"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"0\.row_values\.npy has changed since it was written"):
        LatentStore(path).verify()
    file.write_bytes(b"\xff" * 8 + raw[8:])
    with pytest.raises(IntegrityError, match=r"cannot read .*0\.row_values\.npy"):
        LatentStore(path)


def test_pickles_and_other_arrays_are_refused(path: Path):
    file = path / "roles.npy"
    size, array = file.stat().st_size, np.load(file)
    for other in (array.view(np.int8), array[None]):
        np.save(file, other)
        assert file.stat().st_size == size
        with pytest.raises(IntegrityError, match=r"roles\.npy holds another array than was written"):
            LatentStore(path)
    with file.open("wb") as stream:
        np.save(stream, np.array([{}], dtype=object), allow_pickle=True)
        stream.write(b"\0" * (size - stream.tell()))
    with pytest.raises(
        IntegrityError, match=r"cannot read .*roles\.npy \(Array can't be memory-mapped: Python objects"
    ):
        LatentStore(path)


def test_a_manifest_that_cannot_be_read(path: Path):
    for text in ("{", "[]", "{}", '{"format": 1, "content": "latents"}'):
        (path / "manifest.json").write_text(text)
        with pytest.raises(IntegrityError, match=r"manifest\.json is damaged"):
            LatentStore(path)
    (path / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match="holds no manifest of a latent store"):
        LatentStore(path)


def test_a_manifest_without_a_file(path: Path):
    files = json.loads((path / "manifest.json").read_text())["files"]
    del files["1.sums"]
    edit_manifest(path, files=files)
    with pytest.raises(IntegrityError, match=r"names no '1\.sums'"):
        LatentStore(path)


def test_an_unfinished_store(path: Path):
    edit_manifest(path, done=2)
    with pytest.raises(InputError, match=r"a finished latent store, received .* after 2 of \d+ stages; run the same"):
        LatentStore(path)
