"""Matching: latents are found again in a shuffled SAE, correlations are those of the dense activations."""

import dataclasses
import math

import polars as pl
import pytest
import torch
from planted_diff import BLIND, adequacy, planted_diff
from tiny_sae import DEAD, make_sae

import saetools
from saetools.data import Conversation, select_positions, tokenize
from saetools.errors import InputError, IntegrityError
from saetools.matching import AcrossSAEs, LatentMatches, compare_across_saes, match_latents, measure_coactivation
from saetools.models import Site, read
from saetools.sae.identity import sae_sha256

CHATS = [
    Conversation.chat(user, answer, id=user)
    for user, answer in (
        ("Hi", "Hello to you."),
        ("What is the weather like?", "Sunny."),
        ("Name a colour, please.", "Red, or maybe blue."),
        ("How do I bake bread?", "Flour, water, salt."),
    )
]


@pytest.fixture(scope="module")
def lm(make_tiny):
    return make_tiny("llama")


def shuffled(sae, seed=3):
    """The same SAE with its latents in another order, and what the order is: new latent of each old one."""
    order = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(seed))
    out = make_sae("relu", d_sae=sae.d_sae)
    with torch.no_grad():
        out.encoder.copy_(sae.encoder[order])
        out.W_dec.copy_(2 * sae.W_dec[order])
        out.b_enc.copy_(sae.b_enc[order])
        out.b_dec.copy_(sae.b_dec)
    return out, torch.argsort(order)


def dense(lm, sae, positions):
    rows = []
    for one in tokenize(CHATS, lm.tokenizer):
        with torch.no_grad():
            x = read(lm, one.token_ids[None], torch.ones(1, len(one), dtype=torch.bool), [Site(1)])[Site(1)][0, 1:]
        rows.append(sae.encode(x[select_positions(one.roles[1:], positions)]).to_dense())
    return torch.cat(rows).double()


@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_correlations_are_those_of_the_dense_activations(lm, monkeypatch, positions, kind):
    a, b = make_sae(kind), make_sae("relu", d_sae=40)
    found = measure_coactivation(lm, a, b, CHATS, positions=positions, batch_tokens=60)
    f, g = dense(lm, a, positions), dense(lm, b, positions)
    assert found.n_tokens == len(f)
    expected = torch.corrcoef(torch.cat([f, g], 1).T)[:48, 48:]
    known = ((f > 0).sum(0) >= 3)[:, None] & ((g > 0).sum(0) >= 3) & torch.isfinite(expected)
    ours = found.correlations(0, 48, min_active=3)
    assert torch.equal(torch.isfinite(ours), known)
    assert 0 < int(known.sum()) < known.numel()
    torch.testing.assert_close(ours[known].double(), expected[known], rtol=1e-3, atol=1e-4)
    monkeypatch.setattr("saetools.matching._ELEMENTS", 100)
    torch.testing.assert_close(found.correlations(5, 30, min_active=3), ours[5:30])


def test_latents_of_a_shuffled_sae_are_found_again(lm):
    sae = make_sae("relu")
    other, place = shuffled(sae)
    coactivation = measure_coactivation(lm, sae, other, CHATS)
    found = match_latents(sae, other, coactivation=coactivation, min_active=2)
    assert found.table["by_cosine"].to_list() == place.tolist()
    assert found.table["cosine"].min() == pytest.approx(1)
    assert found.table["mutual_cosine"].all()
    active = (dense(lm, sae, "all") > 0).sum(0) >= 2
    assert not active[DEAD]
    known = found.table.filter(pl.col("by_correlation").is_not_null())
    assert known["latent"].to_list() == active.nonzero()[:, 0].tolist()
    assert known["by_correlation"].to_list() == place[active].tolist()
    assert known["correlation"].min() == pytest.approx(1, abs=1e-4)
    pairs = found.mutual(by="correlation")
    assert dict(zip(pairs["latent"], pairs["match"], strict=True)) == {
        latent: int(place[latent]) for latent in known["latent"]
    }
    assert pairs["similarity"].is_sorted(descending=True)


def test_only_each_others_best_are_mutual(monkeypatch):
    a, b = make_sae("relu", d_sae=30), make_sae("relu", d_sae=50)
    with torch.no_grad():
        b.W_dec.copy_(torch.randn(50, 32, generator=torch.Generator().manual_seed(7)))
        b.W_dec[4] = a.W_dec[9]
        b.W_dec[5] = a.W_dec[9] + 0.1 * a.W_dec[10]
        a.W_dec[2] = 0
    cosines = a.directions() @ b.directions().T
    monkeypatch.setattr("saetools.matching._ELEMENTS", 350)  # several parts
    table = match_latents(a, b).table
    assert table["by_cosine"][9] == 4
    assert table["mutual_cosine"][9]
    assert table.row(2) == (2, None, None, None)
    for latent, match, cosine, mutual in table.drop_nulls().iter_rows():
        assert match == int(cosines[latent].argmax())
        assert cosine == pytest.approx(float(cosines[latent].max()))
        assert mutual == (int(cosines[:, match].argmax()) == latent)
    assert 0 < table["mutual_cosine"].sum() < 29
    assert "by_correlation" not in table.columns


def across():
    """Latents 3, 8 and 20 of a rise; of their matches in the shuffled b, those of 3 and 8 do."""
    a = make_sae("relu")
    b, place = shuffled(a)
    names = [sae_sha256(a), sae_sha256(b)]
    changes = [torch.zeros(40, 48), torch.zeros(40, 48)]
    changes[0][:, [3, 8, 20]] = torch.tensor([1.0, 2.0, 1.5])
    changes[1][:, place[[3, 8]]] = 1.0
    changes[1][:, place[20]] = -1.0
    diffs = [
        planted_diff(one, sae=name, noise=0.2, seed=seed)
        for seed, (one, name) in enumerate(zip(changes, names, strict=True))
    ]
    return diffs, match_latents(a, b), place


def test_matches_that_rise_too_are_told_from_those_that_do_not(tmp_path):
    diffs, matches, place = across()
    found = compare_across_saes(*diffs, matches)
    rows = {row["latent"]: row for row in found.table.iter_rows(named=True)}
    assert found.table["latent"].to_list()[:3] == [8, 20, 3]
    assert {latent: rows[latent]["rises"] for latent in (3, 8, 20)} == {3: True, 8: True, 20: False}
    assert rows[8]["match"] == int(place[8])
    theirs = diffs[1].table.row(int(place[8]), named=True)
    assert all(rows[8][f"match_{name}"] == theirs[name] for name in ("delta", "low", "high", "q_value", "rank"))
    assert found.n_rising == len(found.table)
    assert found.share == found.table["rises"].mean()
    rising = diffs[1].table.filter((pl.col("q_value") <= 0.05) & (pl.col("delta") > 0))
    assert found.share_of_all == pytest.approx(len(rising) / 48)
    loaded = AcrossSAEs.load(found.save(tmp_path))
    assert loaded.table.equals(found.table)
    assert (loaded.share, loaded.share_of_all, loaded.n_rising) == (found.share, found.share_of_all, found.n_rising)
    assert loaded.provenance == found.provenance
    assert found.warnings == loaded.warnings == ()
    blind = dataclasses.replace(diffs[1], adequacy={"prompt": adequacy(0.1)})
    (warning,) = compare_across_saes(diffs[0], blind, matches).warnings
    assert warning.startswith(f"second SAE: {BLIND}")
    none = dataclasses.replace(matches, table=matches.table.with_columns(pl.lit(False).alias("mutual_cosine")))
    empty = compare_across_saes(*diffs, none)
    assert empty.table.is_empty()
    assert math.isnan(empty.share)
    assert math.isnan(AcrossSAEs.load(empty.save(tmp_path)).share_of_all)


def test_what_does_not_match_is_an_error(lm):
    diffs, matches, _ = across()
    a, b = make_sae("relu"), make_sae("relu", d_in=16)
    coactivation = measure_coactivation(lm, a, make_sae("topk"), CHATS)
    header = planted_diff(torch.zeros(40, 48), role="header", sae=diffs[1].provenance["sae"])
    for call, message in (
        (lambda: match_latents(a, b), "b: expected an SAE of width 32, received 16"),
        (lambda: match_latents(a, a, coactivation=coactivation), "coactivation: expected that of these SAEs"),
        (lambda: match_latents(a, a).mutual(by="correlation"), "by: expected 'cosine'.*match with coactivation="),
        (lambda: measure_coactivation(lm, a, b, CHATS), "b: expected an SAE of width 32, received 16"),
        (lambda: measure_coactivation(lm, a, a, []), "conversations: expected tokens at 'all'"),
        (lambda: compare_across_saes(*diffs[::-1], matches), "matches: expected those of the SAEs"),
        (lambda: compare_across_saes(diffs[0], header, matches), "matches: .*diffs of one role"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_saved_matches_are_the_same(lm, tmp_path):
    a, b = make_sae("relu"), make_sae("topk")
    found = match_latents(a, b, coactivation=measure_coactivation(lm, a, b, CHATS), min_active=3)
    loaded = LatentMatches.load(found.save(tmp_path))
    assert loaded.table.equals(found.table)
    assert loaded.provenance == found.provenance
    found.table.head(1).write_parquet(tmp_path / "latents.parquet")
    with pytest.raises(IntegrityError, match="has changed"):
        LatentMatches.load(tmp_path)


def test_the_shipped_sae_matches_itself_by_what_it_is_active_on(smollm):
    sae = saetools.load_sae(saetools.shipped_path("sae/smollm2-135m"))
    texts = [Conversation(text=one.neutral) for one in saetools.load_voices()[:12]]
    done = []
    found = measure_coactivation(smollm.base, sae, sae, texts, on_progress=lambda *args: done.append(args))
    assert done[-1] == (12, 12)
    table = match_latents(sae, sae, coactivation=found).table
    known = table.filter(pl.col("by_correlation").is_not_null())
    assert 50 < len(known) < 8192
    assert (known["by_correlation"] == known["latent"]).mean() > 0.99
    assert (table["by_cosine"] == table["latent"]).mean() > 0.99
