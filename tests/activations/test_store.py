"""The store on disk: its content, its shuffle, its resuming, and what it says when something is wrong."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from saetools.activations import (
    ActivationStore,
    HarvestConfig,
    SiteActivations,
    StoredActivations,
    harvest,
    stream_activations,
)
from saetools.data import Conversation, Role, TokenizedConversation, tokenize
from saetools.errors import InputError, IntegrityError, NonFiniteError, ResourceError
from saetools.models import LanguageModel, Site, edit, load_model, read
from saetools.provenance import sha256_of_file

SITES = [Site(0), Site(1, "mlp_out")]
SMALL = HarvestConfig(dtype="float32", batch_tokens=300, shard_tokens=150)


@pytest.fixture(scope="module")
def store(
    tiny_lm: LanguageModel, tokenized: list[TokenizedConversation], tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    """A store of several shards, to be read only."""
    return harvest(tiny_lm, SITES, tokenized, tmp_path_factory.mktemp("store"), config=SMALL)


def edit_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def files_of(path: Path) -> dict[str, str]:
    return {file.name: sha256_of_file(file) for file in sorted(path.iterdir())}


# Content


@pytest.mark.parametrize("skip_first", [True, False])
def test_every_token_is_there_once_as_if_read_alone(
    tiny_lm: LanguageModel, tokenized: list[TokenizedConversation], tmp_path: Path, skip_first: bool
):
    config = dataclasses.replace(SMALL, skip_first=skip_first)
    store = harvest(tiny_lm, SITES, tokenized, tmp_path, config=config)
    assert len(store.manifest["shards"]) > 3
    assert store.sites == tuple(SITES)
    assert store.d_model == 32
    blocks = list(store.blocks())
    assert len(store) == sum(map(len, blocks)) == sum(len(one) - skip_first for one in tokenized)
    expected = [(number, position) for number, one in enumerate(tokenized) for position in range(skip_first, len(one))]
    places = [(block.documents.tolist(), block.positions.tolist()) for block in blocks]
    assert [pair for documents, positions in places for pair in zip(documents, positions, strict=True)] == expected
    for number, one in enumerate(tokenized):
        block = next((block for block in blocks if number in block.documents.tolist()), None)
        if block is None:
            assert len(one) == skip_first
            continue
        rows = block.documents == number
        with torch.no_grad():
            alone = read(tiny_lm, one.token_ids[None], torch.ones(1, len(one), dtype=torch.bool), SITES)
        assert torch.equal(block.token_ids[rows], one.token_ids[skip_first:])
        assert torch.equal(block.roles[rows], one.roles[skip_first:])
        for site in SITES:
            torch.testing.assert_close(block.acts[site][rows], alone[site][0, skip_first:], rtol=1e-5, atol=1e-5)


def test_bfloat16_by_default(tiny_lm: LanguageModel, tokenized: list[TokenizedConversation], tmp_path: Path):
    store = harvest(tiny_lm, [Site(0)], tokenized[:4], tmp_path)
    (block,) = store.blocks()
    (streamed,) = stream_activations(tiny_lm, [Site(0)], tokenized[:4])
    order = torch.argsort(streamed.documents, stable=True)
    assert torch.equal(block.acts[Site(0)], streamed.acts[Site(0)][order].bfloat16())


def test_shards_are_mapped_into_memory(store: ActivationStore):
    block = store.open_shard(0)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list its maps")
    assert str(store.path / store.manifest["shards"][0]["file"]) in maps.read_text()
    assert len(block) == store.manifest["shards"][0]["tokens"]


def test_reopened_store_is_whole(store: ActivationStore):
    again = ActivationStore(store.path)
    again.verify()
    assert len(again) == len(store)
    assert len({shard["file"] for shard in again.manifest["shards"]}) == len(again.manifest["shards"])


# Batches


@pytest.fixture(params=[1, 2, 16])
def source(request: pytest.FixtureRequest, store: ActivationStore) -> SiteActivations:
    """The first site with small and large pools."""
    return StoredActivations(store, (Site(0),), pool_shards=request.param).at(Site(0))


def all_rows(store: ActivationStore) -> torch.Tensor:
    return torch.cat([block.acts[Site(0)] for block in store.blocks()])


@pytest.mark.parametrize("batch_size", [1, 7, 64, 333])
def test_an_epoch_is_a_permutation(store: ActivationStore, source: SiteActivations, batch_size: int):
    batches = list(source.epoch_batches(batch_size, seed=3))
    assert len(batches) == source.n_batches(batch_size) == len(store) // batch_size
    assert all(batch.shape == (batch_size, 32) for batch in batches)
    rows = [tuple(row) for row in all_rows(store).tolist()]
    drawn = [tuple(row) for batch in batches for row in batch.tolist()]
    assert Counter(drawn) <= Counter(rows)  # conversations that begin alike have equal rows
    assert drawn != rows[: len(drawn)]


def test_the_order_depends_on_seed_and_epoch_only(source: SiteActivations):
    def order(**settings: int) -> torch.Tensor:
        return torch.cat(list(source.epoch_batches(50, **settings)))

    assert torch.equal(order(seed=3), order(seed=3))
    assert torch.equal(order(seed=3, epoch=2), order(seed=3, epoch=2))
    assert not torch.equal(order(seed=3), order(seed=4))
    assert not torch.equal(order(seed=3), order(seed=3, epoch=1))


@pytest.mark.parametrize("batch_size", [1, 7, 64, 333])
def test_starting_later_equals_skipping(source: SiteActivations, batch_size: int):
    batches = list(source.epoch_batches(batch_size, seed=3, epoch=1))
    n_batches = len(batches)
    for start in {0, 1, 2, n_batches // 3, n_batches // 2, n_batches - 1, n_batches}:
        rest = list(source.epoch_batches(batch_size, seed=3, epoch=1, start=start))
        assert len(rest) == n_batches - start
        assert all(torch.equal(a, b) for a, b in zip(rest, batches[start:], strict=True))


def test_sample(store: ActivationStore):
    source = store.at(Site(0))
    assert source.sample(100, seed=1).shape == (100, 32)
    assert torch.equal(source.sample(100, seed=1), source.sample(100, seed=1))
    everything = source.sample(10**9, seed=1)
    assert torch.equal(everything.sort(0).values, all_rows(store).sort(0).values)


def test_a_site_that_was_not_harvested(store: ActivationStore):
    with pytest.raises(
        InputError, match=r"site: expected one of blocks\.0\.hook_resid_post, .*received blocks\.2\.hook"
    ):
        store.at(Site(2))


# Resuming


def test_a_killed_harvest_ends_in_the_same_bytes(
    tiny_lm: LanguageModel,
    tokenized: list[TokenizedConversation],
    tokenizer: Any,
    tmp_path: Path,
    kill_midway: Callable[..., list[int]],
):
    tiny_lm.model.save_pretrained(tmp_path / "model")
    lm = load_model(str(tmp_path / "model"), tokenizer=tokenizer)
    whole = harvest(lm, SITES, tokenized, tmp_path / "whole", config=SMALL)
    out = tmp_path / "killed"
    args = (str(out), tokenizer.name_or_path, str(tmp_path / "model"), json.dumps(dataclasses.asdict(SMALL)))
    script, last = Path(__file__).with_name("tiny_harvest.py"), len(whole.manifest["shards"]) - 2
    kill_midway(script, *args, last=last, within=0.02)
    with pytest.raises(InputError, match=r"a finished harvest, received \d+ shards of an unfinished one"):
        ActivationStore(out)
    harvest(lm, SITES, tokenized, out, config=SMALL)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_a_finished_harvest_is_not_done_again(
    store: ActivationStore,
    tiny_lm: LanguageModel,
    tokenized: list[TokenizedConversation],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("saetools.activations.store.stream_activations", None)
    seen: list[tuple[int, int]] = []
    harvest(tiny_lm, SITES, tokenized, store.path, config=SMALL, on_progress=lambda *done: seen.append(done))
    assert seen[-1][0] == seen[-1][1] == sum(map(len, tokenized))
    assert len(seen) == len(store.manifest["shards"])


def test_leftovers_of_a_kill_are_removed(
    tiny_lm: LanguageModel, tokenized: list[TokenizedConversation], tmp_path: Path
):
    (tmp_path / "shard-00001.4711.tmp").write_bytes(b"half")
    (tmp_path / ".manifest.json.4711.tmp").write_bytes(b"half")
    (tmp_path / "notes.tmp").write_bytes(b"not ours")
    harvest(tiny_lm, SITES, tokenized[:3], tmp_path)
    assert sorted(file.name for file in tmp_path.glob("*.tmp")) == ["notes.tmp"]


def test_a_disk_that_is_full(
    tiny_lm: LanguageModel, tokenized: list[TokenizedConversation], tmp_path: Path, small_files: Callable[[int], Any]
):
    def fill(done: int, total: int) -> None:
        limit.enter_context(small_files(5000))

    with (
        ExitStack() as limit,
        pytest.raises(ResourceError, match=r"no disk space for shard 1 in .*; those before it stand"),
    ):
        harvest(tiny_lm, SITES, tokenized, tmp_path, config=SMALL, on_progress=fill)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    assert len(harvest(tiny_lm, SITES, tokenized, tmp_path, config=SMALL).manifest["shards"]) > 3


def test_two_processes_write_the_store_of_one(
    tiny_lm: LanguageModel, tokenized: list[TokenizedConversation], tokenizer: Any, tmp_path: Path
):
    tiny_lm.model.save_pretrained(tmp_path / "model")
    lm = load_model(str(tmp_path / "model"), tokenizer=tokenizer)
    whole = harvest(lm, SITES, tokenized, tmp_path / "whole", config=SMALL)
    assert len(whole.manifest["shards"]) % 2 == 1  # the last round is not full
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("tiny_harvest.py")), str(tmp_path / "divided")]
    command += [tokenizer.name_or_path, str(tmp_path / "model"), json.dumps(dataclasses.asdict(SMALL)), "together"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files_of(tmp_path / "divided") == files_of(tmp_path / "whole")
    assert {line.split()[0] for line in done.stdout.splitlines() if line.startswith("rank")} == {"rank0", "rank1"}


# Another harvest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sites": [Site(2)]}, "differs in sites"),
        ({"config": dataclasses.replace(SMALL, skip_first=False)}, "differs in config"),
        ({"conversations": 3}, "differs in data_sha256, roles_sha256"),
        ({"roles": True}, "differs in roles_sha256"),
        ({"lm": "gpt2"}, "differs in model"),
    ],
)
def test_a_store_of_another_harvest(
    store: ActivationStore,
    tiny_lm: LanguageModel,
    tokenized: list[TokenizedConversation],
    make_tiny: Any,
    changes: dict[str, Any],
    words: str,
):
    conversations = tokenized[: changes.get("conversations")]
    if "roles" in changes:
        other = torch.full_like(tokenized[0].roles, int(Role.PROMPT))
        conversations = [dataclasses.replace(tokenized[0], roles=other), *tokenized[1:]]
    lm = dataclasses.replace(tiny_lm, name="another") if "lm" in changes else tiny_lm
    with pytest.raises(InputError, match=rf"store of the same harvest, received .*{words}; choose another folder"):
        harvest(lm, changes.get("sites", SITES), conversations, store.path, config=changes.get("config", SMALL))


def test_other_versions_may_read_but_not_continue(
    tiny_lm: LanguageModel, tokenized: list[TokenizedConversation], tmp_path: Path
):
    harvest(tiny_lm, SITES, tokenized, tmp_path, config=SMALL)
    edit_manifest(tmp_path, versions={"torch": "1.0"})
    harvest(tiny_lm, SITES, tokenized, tmp_path, config=SMALL)
    edit_manifest(tmp_path, complete=False)
    with pytest.raises(InputError, match="differs in versions"):
        harvest(tiny_lm, SITES, tokenized, tmp_path, config=SMALL)


def test_a_store_from_before_roles_were_hashed(
    tiny_lm: LanguageModel, tokenized: list[TokenizedConversation], tmp_path: Path
):
    harvest(tiny_lm, SITES, tokenized, tmp_path, config=SMALL)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["roles_sha256"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert len(harvest(tiny_lm, SITES, tokenized, tmp_path, config=SMALL)) == len(ActivationStore(tmp_path))


# Damage


@pytest.fixture
def damaged(tiny_lm: LanguageModel, tokenized: list[TokenizedConversation], tmp_path: Path) -> Path:
    """A store that a test may damage."""
    harvest(tiny_lm, SITES, tokenized, tmp_path, config=SMALL)
    return tmp_path


def test_missing_and_truncated_shards(damaged: Path, tiny_lm: LanguageModel, tokenized: list[TokenizedConversation]):
    shard = damaged / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"shard-00001\.safetensors is missing or damaged; harvest again"):
        ActivationStore(damaged)
    shard.unlink()
    with pytest.raises(IntegrityError, match=r"shard-00001\.safetensors is missing or damaged"):
        ActivationStore(damaged)
    with pytest.raises(IntegrityError, match=r"shard-00001\.safetensors is missing or damaged"):
        harvest(tiny_lm, SITES, tokenized, damaged, config=SMALL)


def test_changed_bytes(damaged: Path):
    shard = damaged / "shard-00001.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-3] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"shard-00001\.safetensors has changed since it was written"):
        ActivationStore(damaged).verify()
    raw[:8] = b"\xff" * 8
    shard.write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"cannot read .*shard-00001\.safetensors"):
        ActivationStore(damaged).open_shard(1)


def test_a_manifest_that_cannot_be_read(damaged: Path):
    for text in ("{", "[]", "{}", '{"format": 1}'):
        (damaged / "manifest.json").write_text(text)
        with pytest.raises(IntegrityError, match=r"manifest\.json is damaged"):
            ActivationStore(damaged)
    (damaged / "manifest.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match="a store of format 1, received format 2"):
        ActivationStore(damaged)
    (damaged / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match=r"holds no readable manifest\.json"):
        ActivationStore(damaged)


# What cannot be harvested


def test_no_conversations_and_unknown_dtype(tiny_lm: LanguageModel, tokenized: Any, tmp_path: Path):
    with pytest.raises(InputError, match="conversations: expected at least one"):
        harvest(tiny_lm, SITES, [], tmp_path)
    with pytest.raises(InputError, match=r"config\.dtype: expected bfloat16, float16 or float32, received 'int8'"):
        harvest(tiny_lm, SITES, tokenized, tmp_path, config=HarvestConfig(dtype="int8"))


def test_activations_too_large_for_float16(tiny_lm: LanguageModel, tokenized: Any, tmp_path: Path):
    with (
        edit(tiny_lm, {Site(0): lambda acts, where: acts * 1e6}),
        pytest.raises(NonFiniteError, match=r"blocks\.0\.hook_resid_post are too large for float16"),
    ):
        harvest(tiny_lm, [Site(0)], tokenized, tmp_path, config=HarvestConfig(dtype="float16"))
    assert not list(tmp_path.iterdir())


def test_nan_leaves_what_was_written(tiny_lm: LanguageModel, tokenized: Any, tmp_path: Path):
    last = int(tokenized[-1].token_ids[5])

    def spoil(acts: torch.Tensor, where: Any) -> torch.Tensor:
        return torch.where((where.token_ids == last)[..., None], torch.nan, acts)

    bad = [number for number, one in enumerate(tokenized) if last in one.token_ids[1:].tolist()]
    good = tokenized[: bad[0]] or tokenized[:0]
    config = dataclasses.replace(SMALL, shard_tokens=1)
    with edit(tiny_lm, {Site(0): spoil}), pytest.raises(NonFiniteError, match=tokenized[bad[0]].id):
        harvest(tiny_lm, SITES, tokenized, tmp_path, config=config)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(good)


# The real model


def test_the_real_model(smollm: LanguageModel, tmp_path: Path):
    texts = ["A car needs oil.", "Save a little every month.", "Water the roses in the morning, not at noon."]
    tokens = list(tokenize([Conversation(text=text) for text in texts], smollm.tokenizer))
    site = Site(15)
    store = harvest(smollm, [site], tokens, tmp_path)
    (batch,) = store.at(site).epoch_batches(len(store), seed=0)
    assert batch.shape == (sum(len(one) - 1 for one in tokens), 576)
    assert batch.dtype == torch.bfloat16
    assert store.manifest["model"]["name"] == smollm.name
    norms = batch.float().norm(dim=1)
    assert norms.max() < 20 * norms.median()
