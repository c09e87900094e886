"""Activations straight from a model: the tokens of a store, shuffled, entered anywhere, and an SAE trained on them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_harvest import SITES, TRAIN, source_of

from saetools.activations import StoredActivations, StreamedActivations, harvest
from saetools.data import TokenizedConversation
from saetools.errors import InputError
from saetools.models import LanguageModel, Site, load_model
from saetools.sae import TopKLoss, TrainRun, train_sae, train_saes

WEIGHTS = "sae_weights.safetensors"


@pytest.fixture(params=[30, 100, 10_000], ids=lambda size: f"buffer{size}")
def source(
    request: pytest.FixtureRequest, tiny_lm: LanguageModel, tokenized: list[TokenizedConversation]
) -> StreamedActivations:
    """Two sites, with small and large buffers."""
    return StreamedActivations(tiny_lm, SITES, tokenized, buffer_tokens=request.param, dtype=torch.float32)


def rows(batches: list[Any], site: Site) -> Counter[tuple[float, ...]]:
    return Counter(tuple(row) for batch in batches for row in batch[site].mul(1e4).round().tolist())


def test_an_epoch_is_what_a_store_holds(
    source: StreamedActivations, tiny_lm: LanguageModel, tokenized: list[TokenizedConversation], tmp_path: Path
):
    store = harvest(tiny_lm, SITES, tokenized, tmp_path)
    stored = StoredActivations(store)
    assert len(source) == len(store)
    assert source.n_batches(7) == len(store) // 7
    streamed = [list(source.epoch_batches(1, seed=2)), list(stored.epoch_batches(1, seed=2))]
    for site in SITES:
        a, b = (torch.cat([batch[site] for batch in batches]).float() for batches in streamed)
        # The store rounds to bfloat16; sums do not depend on the order.
        torch.testing.assert_close(a.sum(0), b.sum(0), rtol=1e-2, atol=0.1)
        assert a.shape == b.shape == (len(store), 32)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_starting_later_equals_skipping(source: StreamedActivations, batch_size: int):
    batches = list(source.epoch_batches(batch_size, seed=3, epoch=1))
    assert len(batches) == source.n_batches(batch_size)
    for start in {0, 1, len(batches) // 2, len(batches) - 1, len(batches)}:
        rest = list(source.epoch_batches(batch_size, seed=3, epoch=1, start=start))
        assert len(rest) == len(batches) - start
        for a, b in zip(rest, batches[start:], strict=True):
            assert all(torch.equal(a[site], b[site]) for site in SITES)


def test_no_pool_is_read_that_a_resumed_run_does_not_need(
    tiny_lm: LanguageModel, tokenized: list[TokenizedConversation], monkeypatch: pytest.MonkeyPatch
):
    source = StreamedActivations(tiny_lm, SITES, tokenized, buffer_tokens=60)
    n_pools = sum(n_tokens > 0 for _, n_tokens in source.pools(torch.Generator().manual_seed(0)))
    loaded: list[Any] = []
    load = StreamedActivations.load
    monkeypatch.setattr(StreamedActivations, "load", lambda self, key: loaded.append(key) or load(self, key))
    list(source.epoch_batches(10, seed=0))
    assert len(loaded) == n_pools > 3
    loaded.clear()
    list(source.epoch_batches(10, seed=0, start=source.n_batches(10) - 1))
    assert len(loaded) <= 2


def test_pools_fit_the_buffer(tiny_lm: LanguageModel, tokenized: list[TokenizedConversation]):
    longest = max(map(len, tokenized))
    for overlap in (False, True):
        source = StreamedActivations(tiny_lm, SITES, tokenized, buffer_tokens=90, overlap=overlap)
        sizes = [n_tokens for _, n_tokens in source.pools(torch.Generator())]
        assert sum(sizes) == len(source)
        assert max(sizes) <= max(longest, 45 if overlap else 90)


def test_overlap_changes_the_time_only(tiny_lm: LanguageModel, tokenized: list[TokenizedConversation]):
    sources = [
        StreamedActivations(tiny_lm, SITES, tokenized, buffer_tokens=size, overlap=overlap)
        for size, overlap in ((60, False), (120, True))
    ]
    # One after the other: nothing else may run the model while a thread does.
    for a, b in zip(*(list(source.epoch_batches(7, seed=1)) for source in sources), strict=True):
        assert all(torch.equal(a[site], b[site]) for site in SITES)


def test_an_error_in_the_other_thread_is_raised(tiny_lm: LanguageModel, tokenized: list[TokenizedConversation]):
    source = StreamedActivations(tiny_lm, [Site(99)], tokenized, buffer_tokens=60, overlap=True)
    with pytest.raises(InputError, match="99"):
        list(source.epoch_batches(7, seed=1))


def test_the_sample_is_not_read_twice(source: StreamedActivations, monkeypatch: pytest.MonkeyPatch):
    sample = source.sample(10, seed=5)
    assert all(sample[site].shape == (10, 32) for site in SITES)
    n_pools = len(source.pools(torch.Generator()))
    if n_pools == 1:
        monkeypatch.setattr("saetools.activations.stream.stream_activations", None)
    first = next(iter(source.epoch_batches(10, seed=5)))
    assert torch.equal(first[SITES[0]], sample[SITES[0]])


def test_what_cannot_be_streamed(tiny_lm: LanguageModel, tokenized: list[TokenizedConversation]):
    with pytest.raises(InputError, match="buffer_tokens: expected 1 or more, received 0"):
        StreamedActivations(tiny_lm, SITES, tokenized, buffer_tokens=0)
    with pytest.raises(InputError, match="conversations: expected at least one"):
        StreamedActivations(tiny_lm, SITES, [])
    with pytest.raises(InputError, match=r"site: expected one of blocks\.0.*received blocks\.1\.hook_resid_post"):
        StreamedActivations(tiny_lm, SITES, tokenized).at(Site(1))


# Training


@pytest.mark.parametrize("kind", ["stream", "store"])
def test_a_killed_run_ends_in_the_same_bytes(
    tiny_lm: LanguageModel,
    tokenized: list[TokenizedConversation],
    tokenizer: Any,
    tmp_path: Path,
    kill_midway: Callable[..., list[int]],
    kind: str,
):
    tiny_lm.model.save_pretrained(tmp_path / "model")
    script, steps = Path(__file__).with_name("tiny_harvest.py"), []
    for _ in range(3):
        args = (str(tmp_path / "killed"), tokenizer.name_or_path, str(tmp_path / "model"), kind)
        steps += kill_midway(script, *args, last=12)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        lm = load_model(str(tmp_path / "model"), tokenizer=tokenizer)
        for folder in ("killed", "whole"):
            source = source_of(kind, lm, tokenized, str(tmp_path / folder))
            train_sae(source.at(SITES[0]), TRAIN, tmp_path / folder)
    finally:
        torch.set_num_threads(threads)
    killed, whole = ((tmp_path / folder / WEIGHTS).read_bytes() for folder in ("killed", "whole"))
    assert killed == whole, f"killed after steps {steps}"


def test_several_saes_in_one_pass_over_two_layers(
    tiny_lm: LanguageModel, tokenized: list[TokenizedConversation], tmp_path: Path
):
    source = StreamedActivations(tiny_lm, SITES, tokenized, buffer_tokens=120)
    wide = dataclasses.replace(TRAIN, d_sae=80, loss=TopKLoss(k=5), seed=3)
    runs = [
        TrainRun(config, tmp_path / f"{number}", site)
        for number, (config, site) in enumerate([(TRAIN, SITES[0]), (wide, SITES[0]), (TRAIN, SITES[1])])
    ]
    saes = train_saes(source, runs)
    assert [sae.d_sae for sae in saes] == [40, 80, 40]
    for run in runs:
        alone = tmp_path / "alone" / Path(run.out).name
        train_sae(source.at(run.site), run.config, alone)
        assert (alone / WEIGHTS).read_bytes() == (Path(run.out) / WEIGHTS).read_bytes()
