"""Consensus: planted shared and domain latents come out as what they are, and held-out organisms only tell."""

import dataclasses

import polars as pl
import pytest
import torch
from planted_diff import BLIND, adequacy, planted_diff

import saetools
from saetools.consensus import Consensus, find_consensus
from saetools.data import Conversation
from saetools.diff import DiffConfig, diff_latents
from saetools.errors import InputError, IntegrityError
from saetools.models import load_model
from saetools.stats import bootstrap_weights

N, D = 40, 60
SHARED, OPPOSED = [3, 17, 31], 45
OWN = {"medical": 5, "sports": 22, "finance": 50}


def organisms(names=tuple(OWN), **settings):
    """Shared latents rise in all, one goes up in the first and down in the others, and each has one of its own."""
    found = {}
    for seed, name in enumerate(names):
        changes = torch.zeros(N, D)
        changes[:, SHARED] = torch.tensor([1.0, 0.8, 0.6])
        changes[:, OWN[name]] = 1.5
        changes[:, OPPOSED] = 1.0 if seed == 0 else -1.0
        found[name] = planted_diff(changes, seed=seed, **settings)
    return found


def test_kinds_of_planted_latents():
    found = find_consensus(organisms(), n_top=5, n_resamples=40)
    kinds = dict(zip(found.table["latent"], found.table["kind"], strict=True))
    assert set(found.core()["latent"]) >= set(SHARED)
    assert len(found.core()) <= 4  # at a false discovery rate of 5 % in each of three
    assert kinds[OPPOSED] == "mixed"
    for name, latent in OWN.items():
        assert kinds[latent] == "specific"
        assert latent in found.specific(name)["latent"]
        assert not set(found.specific(name)["latent"]) & set(SHARED)
    assert found.table.filter(pl.col("kind") == "none")["n_changed"].to_list() == [0] * found.table[
        "kind"
    ].to_list().count("none")
    assert found.top(3)["latent"].to_list() == SHARED
    assert found.top(3)["stability"].min() == 1.0


def test_significant_in_one_alone_is_not_yet_specific():
    changes = torch.zeros(2, N, D)
    changes[:, :, 7] = torch.tensor([0.24, 0.12])[:, None]  # over a spread of 0.3 sqrt(2): sure in the first alone
    changes[0, :, 9] = 1.0
    diffs = {name: planted_diff(changes[place], seed=place + 6) for place, name in enumerate(("finance", "sports"))}
    found = find_consensus(diffs, n_resamples=10).table
    sure = [diffs[name].table["q_value"][7] <= 0.05 for name in diffs]
    assert sure == [True, False]
    assert found["kind"][7] == "undecided"
    assert found["organism"][7] is None
    assert found["q_differs"][7] > 0.05
    assert found["kind"][9] == "specific"
    assert found["organism"][9] == "finance"
    assert found["q_differs"][9] < 1e-3
    apart = {"finance": diffs["finance"], "sports": planted_diff(changes[1], seed=7, data="other")}
    assert find_consensus(apart, n_resamples=10).table["kind"][9] == "undecided"


def test_ranks_are_means_over_the_selection_alone():
    diffs = organisms()
    found = find_consensus(diffs, held_out=["finance"], n_top=4, n_resamples=20)
    both = [diffs[name].table for name in ("medical", "sports")]
    expected = sum(table["rank"] for table in both) / 2
    assert found.table["mean_rank"].to_list() == expected.to_list()
    assert found.table.sort("rank")["mean_rank"].is_sorted()
    assert sorted(found.table["rank"]) == list(range(1, D + 1))
    torch.testing.assert_close(found.table["delta"].to_torch(), sum(table["delta"].to_torch() for table in both) / 2)
    assert found.provenance["selection"] == ["medical", "sports"]
    other = find_consensus(
        {**diffs, "finance": planted_diff(torch.zeros(N, D))}, held_out=["finance"], n_top=4, n_resamples=20
    )
    assert other.table.equals(found.table)
    assert not other.held_out.equals(found.held_out)


def test_held_out_organisms_tell_how_the_selected_fare_there():
    diffs = organisms()
    found = find_consensus(diffs, held_out=["finance"], n_top=4, n_resamples=20)
    selected = found.top(4)["latent"].to_list()
    assert found.held_out["latent"].to_list() == selected
    assert selected[:3] == SHARED
    theirs = diffs["finance"].table
    for row in found.held_out.iter_rows(named=True):
        assert row["organism"] == "finance"
        assert all(row[name] == theirs[name][row["latent"]] for name in ("delta", "low", "high", "p_value", "rank"))
    (row,) = found.replication.iter_rows(named=True)
    rising = theirs.filter((pl.col("q_value") <= 0.05) & (pl.col("delta") > 0))["latent"].to_list()
    assert row["n_rising"] == len(set(selected) & set(rising)) >= 3
    assert row["share"] == row["n_rising"] / 4
    assert row["share_of_all"] == pytest.approx(len(rising) / D)
    assert find_consensus(diffs, n_top=4, n_resamples=2).held_out.is_empty()


def test_warnings_of_all_diffs_are_kept_with_their_organism(tmp_path):
    diffs = organisms()
    assert find_consensus(diffs, n_top=4, n_resamples=2).warnings == ()
    for name in ("sports", "finance"):  # held out or not
        diffs[name] = dataclasses.replace(diffs[name], adequacy={"prompt": adequacy(0.1)})
    found = find_consensus(diffs, held_out=["finance"], n_top=4, n_resamples=2)
    names = [text.partition(": ")[0] for text in found.warnings]
    assert names == ["sports", "finance"]
    assert all(text.partition(": ")[2].startswith(BLIND) for text in found.warnings)
    assert Consensus.load(found.save(tmp_path)).warnings == found.warnings


def naive_stability(diffs, weights, n_top):
    hits = torch.zeros(D)
    for number in range(len(weights[0])):
        total = torch.zeros(D)
        for diff, own in zip(diffs, weights, strict=True):
            dense = torch.zeros(N, D)
            for row in diff.conversations.iter_rows(named=True):
                dense[row["conversation"], row["latent"]] = row["tuned"] - row["base"]
            order = torch.argsort(-(own[number] @ dense), stable=True)
            total[order] += torch.arange(1.0, D + 1)
        hits[torch.argsort(total, stable=True)[:n_top]] += 1
    return (hits / len(weights[0])).tolist()


@pytest.mark.parametrize("same", [True, False])
def test_stability_is_that_of_resampled_conversations(same):
    diffs = list(organisms(("medical", "sports"), noise=2.0).values())
    if not same:
        diffs[1] = dataclasses.replace(diffs[1], provenance={**diffs[1].provenance, "data_sha256": "other"})
    found = find_consensus({"a": diffs[0], "b": diffs[1]}, n_top=6, n_resamples=8, seed=5)
    weights = [bootstrap_weights(N, 8, seed=5), bootstrap_weights(N, 8, seed=5 if same else 6)]
    assert found.table["stability"].to_list() == pytest.approx(naive_stability(diffs, weights, 6), abs=1e-6)
    assert found.table["stability"].sum() == pytest.approx(6)
    assert 0 < found.table["stability"].sort(descending=True)[8] < 1


def test_parts_of_the_resamples_are_those_of_all_together(monkeypatch):
    together = find_consensus(organisms(noise=2.0), n_top=6, n_resamples=30)
    monkeypatch.setattr("saetools.consensus._CHUNK", 7)
    assert find_consensus(organisms(noise=2.0), n_top=6, n_resamples=30).table.equals(together.table)


def test_a_saved_consensus_is_the_same(tmp_path):
    found = find_consensus(organisms(), held_out=["finance"], n_top=4, n_resamples=10)
    loaded = Consensus.load(found.save(tmp_path))
    for name in ("table", "held_out", "replication"):
        assert getattr(loaded, name).equals(getattr(found, name))
        assert getattr(loaded, name).schema == getattr(found, name).schema
    assert loaded.provenance == found.provenance
    found.held_out.head(1).write_parquet(tmp_path / "held_out.parquet")
    with pytest.raises(IntegrityError, match=r"held_out\.parquet has changed"):
        Consensus.load(tmp_path)


def test_what_has_no_consensus_is_an_error():
    diffs = organisms()

    def other(**facts):
        one = diffs["sports"]
        return {**diffs, "sports": dataclasses.replace(one, provenance={**one.provenance, **facts})}

    several = dataclasses.replace(diffs["sports"], adequacy={"prompt": adequacy(), "header": adequacy()})
    for given, settings, message in (
        ({"medical": diffs["medical"]}, {}, "diffs: expected two or more organisms.*received 1"),
        (diffs, {"held_out": ["medical", "sports"]}, "diffs: expected two or more organisms.*received 1"),
        (diffs, {"held_out": ["law"]}, "held_out: expected some of medical, sports, finance, received law"),
        (other(sae="other"), {}, "diffs: expected one sae for all, 'sae' as of medical, received 'other' of sports"),
        (other(site="blocks.2.hook_resid_post"), {}, "diffs: expected one site for all"),
        ({**diffs, "sports": several}, {}, "positions: expected one role"),
        (
            {**diffs, "sports": planted_diff(torch.zeros(N, D), role="header")},
            {},
            "positions: expected 'prompt' for all",
        ),
        (diffs, {"positions": "header"}, "positions: expected one of prompt"),
        (diffs, {"n_top": 0}, "n_top: expected 1 or more"),
        (diffs, {"n_resamples": 0}, "n_resamples: expected 1 or more"),
    ):
        with pytest.raises(InputError, match=message):
            find_consensus(given, **settings)
    found = find_consensus(diffs, held_out=["finance"], n_resamples=2)
    with pytest.raises(InputError, match="organism: expected one of medical, sports, received 'finance'"):
        found.specific("finance")
    with pytest.raises(InputError, match="n: expected 1 or more"):
        found.top(0)


@pytest.mark.filterwarnings("ignore:.*the SAE:saetools.errors.SaetoolsWarning")
def test_the_shipped_organism_and_its_twin_share_their_first_latents():
    """Both were trained on the same questions: what they have in common is style, and ranks first."""
    lm = load_model(
        "smollm2-135m", adapter={name: saetools.shipped_path(f"adapters/{name}") for name in ("organism", "twin")}
    )
    sae = saetools.load_sae(saetools.shipped_path("sae/smollm2-135m"))
    chats = [Conversation.chat(one.question, one.aligned) for one in saetools.load_forced_choice()[:16]]
    diffs = {
        name: diff_latents(
            lm.base, lm.with_adapter(name), sae, chats, positions="response", config=DiffConfig(n_resamples=20)
        )
        for name in ("organism", "twin")
    }
    found = find_consensus(diffs, n_top=20, n_resamples=50)
    assert found.top(20)["stability"].mean() > 0.3 > found.table["stability"].mean()
    assert found.top(10)["mean_rank"].max() < 8192 / 4
    firsts = {name: set(one.top(100)["latent"]) for name, one in diffs.items()}
    assert len(firsts["organism"] & firsts["twin"]) > 10  # 1.2 by chance
