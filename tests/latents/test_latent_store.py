"""What a latent store tells, against the dense matrix of activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import random_pairs
import torch
from random_pairs import D_SAE, DEAD, DENSE, MODELS, RARE, VOCABULARY

from saetools.data import POSITIONS, TokenizedConversation, select_positions
from saetools.errors import InputError, NonFiniteError
from saetools.latents import LatentRecord, LatentStore, Passage, merge
from saetools.sae.sparse import TokenMajorPairs

LATENTS = (0, DENSE, DEAD, RARE, 20, D_SAE - 1)


@pytest.fixture(scope="module")
def corpus() -> list[TokenizedConversation]:
    return random_pairs.documents()


@pytest.fixture(scope="module")
def acts(corpus: list[TokenizedConversation]) -> dict[str, torch.Tensor]:
    return {model: random_pairs.dense(corpus, model) for model in MODELS}


@pytest.fixture(scope="module")
def store(corpus: list[TokenizedConversation], tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    """In several shards, merged in several buckets."""
    path = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "BUCKET_PAIRS", 500)
        random_pairs.write(path, corpus)
    return LatentStore(path)


def starts_of(corpus: list[TokenizedConversation]) -> list[int]:
    return torch.tensor([0, *map(len, corpus)]).cumsum(0).tolist()


def by_document(corpus: list[TokenizedConversation], column: torch.Tensor) -> list[torch.Tensor]:
    return list(column.split([len(one) for one in corpus]))


def counted(corpus: list[TokenizedConversation]) -> torch.Tensor:
    """All rows but first positions."""
    return torch.cat([torch.arange(len(one)) > 0 for one in corpus])


def test_all_latents_of_tokens(store: LatentStore, acts: dict[str, torch.Tensor]):
    rows = torch.randperm(len(store))
    for model in MODELS:
        pairs = store.latents_at(rows, model=model)
        assert torch.equal(pairs.combine(torch.eye(D_SAE)), acts[model][rows])
    assert torch.equal(store.latents_at(rows).values, pairs.values)  # the last model is the default
    assert len(store.latents_at(rows[:0]).values) == 0


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("model", MODELS)
def test_top_passages(
    store: LatentStore, corpus: list[TokenizedConversation], acts: dict[str, torch.Tensor], latent: int, model: str
):
    record = store.open_latent(latent, model=model, n_top=15, context=4)
    sizes = torch.stack([each.abs().amax() for each in by_document(corpus, acts[model][:, latent])])
    expected = sizes.sort(descending=True).values[:15]
    expected = expected[expected > 0]
    peaks = torch.tensor([passage.acts[model][passage.peak] for passage in record.top])
    assert torch.equal(peaks.abs(), expected)
    assert len({passage.document for passage in record.top}) == len(record.top)
    assert record.n_active == int((acts[model][:, latent] != 0).sum())
    assert record.n_documents == int((sizes > 0).sum())
    assert abs(record.max) == float(sizes.max())
    for passage in record.top:
        check_passage(passage, corpus, acts, latent, context=4)


def check_passage(
    passage: Passage, corpus: list[TokenizedConversation], acts: dict[str, torch.Tensor], latent: int, *, context: int
) -> None:
    document = corpus[passage.document]
    place = passage.start + passage.peak
    span = slice(max(0, place - context), place + context + 1)
    assert passage.start == span.start
    assert passage.document_id == document.id
    assert passage.dataset == document.source
    assert passage.token_ids == tuple(document.token_ids[span].tolist())
    assert passage.roles == tuple(document.roles[span].tolist())
    assert len(passage.tokens) == len(passage.token_ids)
    assert passage.text == b"".join(VOCABULARY[one] for one in passage.token_ids).decode(errors="replace")
    for model in MODELS:
        column = by_document(corpus, acts[model][:, latent])[passage.document]
        assert passage.acts[model] == tuple(column[span].tolist())


@pytest.mark.parametrize("latent", LATENTS)
def test_passages_of_quantile_bins(
    store: LatentStore, corpus: list[TokenizedConversation], acts: dict[str, torch.Tensor], latent: int
):
    record = store.open_latent(latent, n_top=5, n_bins=3, n_per_bin=4, context=2, seed=1)
    sizes = acts["tuned"][:, latent].abs()
    sizes = sizes[sizes > 0].sort().values
    assert [(each.low, each.high) for each in record.bins] == [(0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)]
    for number, each in enumerate(record.bins):
        part = sizes[number * len(sizes) // 3 : (number + 1) * len(sizes) // 3].tolist()
        for passage in each.passages:
            check_passage(passage, corpus, acts, latent, context=2)
            assert part[0] <= abs(passage.acts["tuned"][passage.peak]) <= part[-1]
        assert len({passage.document for passage in each.passages}) == len(each.passages) <= 4
    if latent in (DENSE, 20):
        assert all(len(each.passages) == 4 for each in record.bins)
    places = [
        (passage.document, passage.start + offset)
        for passage in all_passages(record)
        for offset in range(len(passage.tokens))
    ]
    assert len(set(places)) == len(places)


def all_passages(record: LatentRecord) -> list[Passage]:
    return [*record.top, *(passage for each in record.bins for passage in each.passages)]


def test_the_seed_chooses(store: LatentStore):
    assert store.open_latent(DENSE, seed=3) == store.open_latent(DENSE, seed=3)
    first, second = (store.open_latent(DENSE, seed=seed) for seed in (3, 4))
    assert first.top == second.top
    assert first.bins != second.bins


def test_inactive_passages(store: LatentStore, corpus: list[TokenizedConversation], acts: dict[str, torch.Tensor]):
    found = store.inactive_passages(20, 6, model="base", context=1, seed=2)
    assert len(found) == 6
    for passage in found:
        check_passage(passage, corpus, acts, 20, context=1)
        assert not any(passage.acts["base"])
    assert len({(passage.document, passage.start + passage.peak) for passage in found}) == 6
    assert any(any(passage.acts["tuned"]) for passage in store.inactive_passages(20, 30, model="base", context=1))
    long = store.inactive_passages(DENSE, 3, context=8)
    assert all(not any(passage.acts["tuned"]) for passage in long)


@pytest.mark.parametrize("latent", LATENTS)
def test_activity_by_dataset_and_role(
    store: LatentStore, corpus: list[TokenizedConversation], acts: dict[str, torch.Tensor], latent: int
):
    roles = torch.cat([one.roles for one in corpus])
    seen = set()
    for activity in store.open_latent(latent).activity:
        of_dataset = torch.cat([torch.full((len(one),), one.source == activity.dataset) for one in corpus])
        here = acts[activity.model][of_dataset & counted(corpus) & select_positions(roles, activity.positions), latent]
        assert activity.n_tokens == len(here)
        assert activity.rate == pytest.approx(float((here != 0).float().mean()))
        assert activity.mean == pytest.approx(float(here.double().mean()), abs=1e-6)
        seen.add((activity.model, activity.dataset, activity.positions))
    assert seen == {(model, dataset, role) for model in MODELS for dataset in ("chats", "news") for role in POSITIONS}


@pytest.mark.parametrize("latent", LATENTS)
def test_documents(store: LatentStore, corpus: list[TokenizedConversation], acts: dict[str, torch.Tensor], latent: int):
    columns = by_document(corpus, acts["tuned"][:, latent])
    means = torch.tensor([float(each.abs().sum()) / max(1, len(each) - 1) for each in columns])
    found = store.open_latent(latent).documents
    expected = means.sort(descending=True).values[: merge.N_TOP_DOCUMENTS]
    torch.testing.assert_close(torch.tensor([each.mean for each in found]), expected[expected > 0])
    for each in found:
        assert each.mean == pytest.approx(float(means[each.document]))
        assert (each.document_id, each.dataset) == (corpus[each.document].id, corpus[each.document].source)


def dense_cosines(acts: torch.Tensor) -> torch.Tensor:
    acts = acts.double()
    return (acts.T @ acts) / (acts.norm(dim=0)[:, None] * acts.norm(dim=0)).clamp_min(1e-30)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("latent", LATENTS)
def test_coactive_latents(
    store: LatentStore, corpus: list[TokenizedConversation], acts: dict[str, torch.Tensor], latent: int, model: str
):
    active = acts[model] != 0
    joint = active[active[:, latent]].double().sum(0) / max(1, int(active[:, latent].sum()))
    cosines = dense_cosines(acts[model])[latent]
    cosines[latent] = -2
    cosines[joint == 0] = -2
    found = store.open_latent(latent, model=model).coactive
    expected = cosines.sort(descending=True).values[: merge.N_COACTIVE]
    assert [each.cosine for each in found] == pytest.approx(expected[expected > -2].tolist(), abs=1e-5)
    overall = active.double().sum(0) / counted(corpus).sum()
    for each in found:
        assert each.cosine == pytest.approx(float(cosines[each.latent]), abs=1e-5)
        assert each.rate == pytest.approx(float(joint[each.latent]))
        assert each.pmi == pytest.approx(float((joint / overall)[each.latent].log()), abs=1e-5)


def test_coactive_latents_from_a_sample_of_tokens(
    corpus: list[TokenizedConversation],
    acts: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(merge, "SAMPLE_ROWS", 100)
    random_pairs.write(tmp_path, corpus, models=("base",))
    cosines = dense_cosines(acts["base"])[DENSE]
    found = LatentStore(tmp_path).open_latent(DENSE).coactive
    errors = torch.tensor([each.cosine - float(cosines[each.latent]) for each in found])
    assert 0 < errors.abs().max() < 0.25


def test_neighbours(store: LatentStore):
    directions = torch.nn.functional.normalize(torch.randn(D_SAE, 6, generator=torch.Generator().manual_seed(5)))
    cosines = directions @ directions.T
    cosines.fill_diagonal_(-2)
    for latent in range(D_SAE):
        found = store.open_latent(latent, n_top=0, n_bins=0).neighbours
        expected = cosines[latent].sort(descending=True)
        assert [each.latent for each in found] == expected.indices[:16].tolist()
        assert [each.cosine for each in found] == pytest.approx(expected.values[:16].tolist())


@pytest.mark.parametrize("by", ["mean", "information"])
@pytest.mark.parametrize("token", [1, " b", "a"])
def test_latents_for_a_token(
    store: LatentStore, corpus: list[TokenizedConversation], acts: dict[str, torch.Tensor], token: str | int, by: str
):
    number = token if isinstance(token, int) else VOCABULARY.index(token.encode())
    rows = (torch.cat([one.token_ids for one in corpus]) == number) & counted(corpus)
    here = acts["base"][rows]
    rates, means = (here != 0).double().mean(0), here.double().mean(0)
    pmis = (rates / ((acts["base"] != 0).double().sum(0) / counted(corpus).sum())).log()
    scores = (means if by == "mean" else rates * pmis)[rates > 0]
    found = store.latents_for_token(token, 8, model="base", by=by)
    got = [each.mean if by == "mean" else each.rate * each.pmi for each in found]
    assert got == pytest.approx(scores.sort(descending=True).values[:8].tolist(), abs=1e-6)
    for each in found:
        assert each.rate == pytest.approx(float(rates[each.latent]))
        assert each.mean == pytest.approx(float(means[each.latent]), abs=1e-6)
        assert each.pmi == pytest.approx(float(pmis[each.latent]), abs=1e-6)


def test_a_token_that_does_not_occur(store: LatentStore):
    assert store.latents_for_token("z") == ()


def test_a_token_with_many_occurrences(store: LatentStore, monkeypatch: pytest.MonkeyPatch):
    whole = store.latents_for_token("a", D_SAE)
    monkeypatch.setattr("saetools.latents.store._OCCURRENCES", 50)
    rates = {each.latent: each.rate for each in store.latents_for_token("a", D_SAE)}
    assert rates != {each.latent: each.rate for each in whole}
    assert rates[DENSE] == pytest.approx(0.9, abs=0.15)


def test_latents_of_32_bits(tmp_path: Path, corpus: list[TokenizedConversation], monkeypatch: pytest.MonkeyPatch):
    d_sae = 70_000
    none = {
        "neighbours": torch.zeros(d_sae, 0).int().numpy().view("uint32"),
        "neighbour_cosines": torch.zeros(d_sae, 0),
    }
    none["neighbour_cosines"] = none["neighbour_cosines"].numpy()
    monkeypatch.setattr("saetools.latents.write.neighbour_arrays", lambda directions, n: none)

    def read(some: range) -> dict[str, TokenMajorPairs]:
        n = sum(len(corpus[one]) for one in some)
        rows = torch.cat([(torch.arange(len(corpus[one])) > 0) for one in some]).nonzero()[:, 0]
        latents = torch.stack([torch.full_like(rows, 5), rows + 69_000], 1).flatten()
        return {"base": TokenMajorPairs(rows.repeat_interleave(2), latents, torch.rand(len(latents)) + 1, n)}

    random_pairs.write(tmp_path, corpus, read=read, models=("base",), directions=torch.zeros(d_sae, 1))
    store = LatentStore(tmp_path)
    assert store.open_latent(5).n_active == int(counted(corpus).sum())
    record = store.open_latent(69_001)
    assert record.n_active > 1
    assert [each.latent for each in record.coactive] == [5]
    assert record.coactive[0].rate == 1


# What it refuses


def test_what_a_store_does_not_have(store: LatentStore):
    for latent in (-1, D_SAE):
        with pytest.raises(InputError, match=f"latent: expected 0 to 39, received {latent}"):
            store.open_latent(latent)
    with pytest.raises(InputError, match="model: expected one of base, tuned, received 'other'"):
        store.open_latent(0, model="other")
    with pytest.raises(InputError, match="n_top: expected 0 or more, received -1"):
        store.open_latent(0, n_top=-1)
    with pytest.raises(InputError, match="row: expected 0 to"):
        store.passage(0, len(store))
    with pytest.raises(InputError, match="rows: expected 0 to"):
        store.latents_at(torch.tensor([-1]))
    for token in ("", "ab", 99, -1):
        with pytest.raises(InputError, match="token: expected the text or the id of one token"):
            store.latents_for_token(token)
    with pytest.raises(InputError, match="n: expected 0 or more"):
        store.inactive_passages(0, -1)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"n_tokens": 5}, InputError, "read: expected pairs of 4 tokens, received others for base"),
        ({"tokens": [2, 1]}, InputError, "tokens from 0 to 3, ascending"),
        ({"tokens": [1, 4]}, InputError, "tokens from 0 to 3, ascending"),
        ({"latents": [1, D_SAE]}, InputError, "latents from 0 to 39"),
        ({"latents": [-1, 1]}, InputError, "latents from 0 to 39"),
        ({"values": [1.0, 0.0]}, InputError, "activations other than 0"),
        ({"tokens": [0, 1]}, InputError, "none on first positions, with skip_first"),
        ({"values": [1.0, float("nan")]}, NonFiniteError, "latents of base are not finite from conversation 'x' on"),
    ],
)
def test_pairs_that_are_not_those_of_the_documents(tmp_path: Path, change: dict, error: type, words: str):
    one = TokenizedConversation(torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.uint8), "x", "set")
    given = {"tokens": [1, 2], "latents": [0, 1], "values": [1.0, 2.0], "n_tokens": 4, **change}
    n_tokens = given.pop("n_tokens")
    pairs = TokenMajorPairs(**{name: torch.tensor(value) for name, value in given.items()}, n_tokens=n_tokens)
    with pytest.raises(error, match=words):
        random_pairs.write(tmp_path, [one], read=lambda some: {"base": pairs}, models=("base",))


def test_pairs_of_another_model(tmp_path: Path, corpus: list[TokenizedConversation]):
    with pytest.raises(InputError, match=r"read: expected pairs of \d+ tokens, received others for base"):
        random_pairs.write(tmp_path, corpus, read=lambda some: {}, models=("base",))


def test_nothing_to_index(tmp_path: Path, corpus: list[TokenizedConversation]):
    with pytest.raises(InputError, match="documents: expected at least one"):
        random_pairs.write(tmp_path, [], read=lambda some: {})
    with pytest.raises(InputError, match="models: expected at least one"):
        random_pairs.write(tmp_path, corpus, models=())
    with pytest.raises(InputError, match="vocabulary: expected more than 4 tokens, as the corpus has, received 3"):
        random_pairs.write(tmp_path, corpus, vocabulary=VOCABULARY[:3])


def test_documents_of_rows(store: LatentStore):
    rows = np.arange(len(store))
    corpus = store._corpus
    assert corpus.documents_of(rows).tolist() == corpus.row_documents.tolist()
    assert [corpus.document_of(row) for row in rows[::7].tolist()] == corpus.row_documents[::7].tolist()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells")
def test_nothing_is_read_ahead(store: LatentStore):
    """Every map of a store is told to be read here and there (`rr`): reading ahead would fetch most of the store."""
    flags, mapped = {}, ""
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split(" ", 1)[0]:
            mapped = line.split(" ", 5)[-1].strip()
        elif line.startswith("VmFlags:") and Path(mapped).parent == store.path:
            flags[Path(mapped).stem] = line.split()[1:]
    assert flags.keys() == store.manifest["files"].keys()
    assert all("rr" in each for each in flags.values())
