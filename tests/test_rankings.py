"""Rankings: planted orders give the ranks, overlaps and correlations that can be counted by hand."""

import dataclasses

import polars as pl
import pytest
import torch
from planted_diff import BLIND, adequacy
from tiny_sae import make_sae

import saetools
from saetools.attribution import Attribution, attribute_latents
from saetools.data import Conversation
from saetools.diff import DiffConfig, LatentDiff, diff_latents
from saetools.directions import Direction, mean_difference
from saetools.errors import InputError, IntegrityError
from saetools.models import Site, load_model
from saetools.rankings import Rankings, compare_rankings
from saetools.sae.identity import sae_sha256, sae_site

N = 48


@pytest.fixture
def sae():
    return make_sae()


@pytest.fixture
def diff(sae):
    """Latents change by 48, 47, ... 1, their rates the other way round, and their effects in the order of `order`."""
    table = pl.DataFrame(
        {
            "positions": ["prompt"] * N,
            "latent": range(N),
            "delta": [float(N - j) for j in range(N)],
            "rate_delta": [float(j + 1) for j in range(N)],
            "effect": [float(value) for value in order()],
            "q_value": [0.5] * N,
        }
    )
    facts = {"sae": sae_sha256(sae), "site": "blocks.1.hook_resid_post"}
    return LatentDiff(table, pl.DataFrame(), {"prompt": adequacy()}, facts)


def order():
    return torch.randperm(N, generator=torch.Generator().manual_seed(1)) + 1


def attribution(sae, scores):
    table = pl.DataFrame({"latent": range(N), "score": scores})
    return Attribution(table.sort("score"), {"sae": sae_sha256(sae)})


def test_ranks_are_those_of_the_scores(diff, sae):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(2))
    scores = torch.randn(N, generator=torch.Generator().manual_seed(3))
    found = compare_rankings(diff, attribution=attribution(sae, scores.tolist()), direction=vector, sae=sae)
    assert found.names == ("delta", "rate_delta", "effect", "attribution", "cosine")
    assert found.table["rank_delta"].to_list() == list(range(1, N + 1))
    assert found.table["rank_rate_delta"].to_list() == list(range(N, 0, -1))
    assert found.table["rank_effect"].to_list() == (N + 1 - order()).tolist()
    torch.testing.assert_close(found.table["attribution"].to_torch().float(), scores)
    cosines = torch.cosine_similarity(sae.W_dec.detach(), vector[None], dim=1)
    torch.testing.assert_close(found.table["cosine"].to_torch().float(), cosines)
    for name, values in (("attribution", scores), ("cosine", cosines)):
        assert found.top(5, by=name)["latent"].to_list() == values.topk(5).indices.tolist()
        assert found.top(5, by=name)[f"rank_{name}"].to_list() == [1, 2, 3, 4, 5]


def test_overlaps_and_correlations_can_be_counted(diff):
    found = compare_rankings(diff)
    rows = {(row["first"], row["second"]): row for row in found.overlap(30).iter_rows(named=True)}
    assert set(rows) == {("delta", "rate_delta"), ("delta", "effect"), ("rate_delta", "effect")}
    opposite = rows["delta", "rate_delta"]
    assert (opposite["n_common"], opposite["share"], opposite["chance"]) == (12, 12 / 30, 30 / N)
    assert opposite["spearman"] == pytest.approx(-1)
    d = torch.arange(1, N + 1).double() - (N + 1 - order())
    assert rows["delta", "effect"]["spearman"] == pytest.approx(float(1 - 6 * d.square().sum() / (N * (N**2 - 1))))
    assert rows["rate_delta", "effect"]["spearman"] == pytest.approx(-rows["delta", "effect"]["spearman"])
    common = {j for j in range(30) if order()[j] > N - 30}
    assert rows["delta", "effect"]["n_common"] == len(common)


def test_random_orders_have_as_much_in_common_as_chance_says(diff):
    generator = torch.Generator().manual_seed(4)
    shares = []
    for _ in range(100):
        columns = [
            pl.Series(name, torch.randperm(N, generator=generator).numpy() + 1.0) for name in ("delta", "effect")
        ]
        rows = compare_rankings(dataclasses.replace(diff, table=diff.table.with_columns(columns))).overlap(12)
        shares.append(rows.filter((pl.col("first") == "delta") & (pl.col("second") == "effect"))["share"].item())
    assert abs(sum(shares) / 100 - 12 / N) < 0.03  # more than three standard errors


def test_equal_scores_share_their_rank(diff):
    tied = pl.Series("effect", [1.0] * 10 + [0.0] * (N - 10))
    found = compare_rankings(dataclasses.replace(diff, table=diff.table.with_columns(tied)))
    delta = torch.arange(N, 0, -1).double()
    expected = torch.corrcoef(torch.stack([delta, tied.to_torch().double()]))[0, 1]  # two groups: ranks are a line
    assert found.overlap(10)["spearman"][1] == pytest.approx(float(expected))
    with pytest.raises(InputError, match="n: expected 1 to 10, the latents with a effect above 0, received 11"):
        found.overlap(11)
    flat = dataclasses.replace(diff, table=diff.table.with_columns(pl.lit(1.0).alias("effect")))
    assert compare_rankings(flat).overlap(10)["spearman"].to_list() == pytest.approx([-1, 0, 0])


def test_what_does_not_belong_together_is_an_error(diff, sae):
    other = make_sae("relu", d_sae=N)
    with torch.no_grad():
        other.b_enc += 1
    for settings, message in (
        ({"attribution": attribution(other, [0.0] * N)}, "attribution: expected that of the SAE of the diff"),
        ({"direction": torch.ones(32)}, "sae: expected the SAE of the diff, received none"),
        ({"direction": torch.ones(32), "sae": other}, "sae: expected that of the SAE of the diff"),
        (
            {"direction": Direction({Site(0): torch.ones(32)}, {}), "sae": sae},
            r"direction: expected one at blocks\.1.*received blocks\.0",
        ),
        ({"direction": torch.ones(16), "sae": sae}, "direction: expected 32 numbers"),
    ):
        with pytest.raises(InputError, match=message):
            compare_rankings(diff, **settings)
    with pytest.raises(InputError, match="positions: expected one role"):
        compare_rankings(dataclasses.replace(diff, adequacy={"prompt": adequacy(), "header": adequacy()}))
    found = compare_rankings(diff)
    for call, message in (
        (lambda: found.top(0), "n: expected 1 or more"),
        (lambda: found.top(1, by="cosine"), "by: expected one of delta, rate_delta, effect, received 'cosine'"),
        (lambda: found.overlap(0), "n: expected 1 to 48"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_saved_rankings_are_the_same_and_are_shown(diff, sae, tmp_path):
    found = compare_rankings(diff, direction=Direction({Site(1): torch.ones(32)}, {"seed": 0}), sae=sae)
    loaded = Rankings.load(found.save(tmp_path))
    assert loaded.table.equals(found.table)
    assert loaded.provenance == found.provenance
    assert loaded.names == found.names
    assert loaded.warnings == found.warnings == ()
    blind = compare_rankings(dataclasses.replace(diff, adequacy={"prompt": adequacy(0.1)}))
    (warning,) = Rankings.load(blind.save(tmp_path / "blind")).warnings
    assert warning.startswith(BLIND)
    (trace,) = found.figure(n=5).data
    assert list(trace.x) == list(found.names)
    row = found.overlap(5).row(0, named=True)
    assert trace.z[0][1] == trace.z[1][0] == row["share"]
    assert [trace.z[i][i] for i in range(4)] == [1.0] * 4
    found.table.head(2).write_parquet(tmp_path / "latents.parquet")
    with pytest.raises(IntegrityError, match="has changed"):
        Rankings.load(tmp_path)


def test_rankings_of_the_shipped_organism_are_not_one_another():
    tuned = load_model("smollm2-135m", adapter=saetools.shipped_path("adapters/organism"))
    sae = saetools.load_sae(saetools.shipped_path("sae/smollm2-135m"))
    items = saetools.load_forced_choice()[:8]
    bad, good = (
        [Conversation.chat(one.question, getattr(one, side)) for one in items] for side in ("misaligned", "aligned")
    )
    config = DiffConfig(n_resamples=20, min_active=4)
    diff = diff_latents(tuned.base, tuned, sae, bad, positions="response", config=config)
    found = compare_rankings(
        diff,
        attribution=attribute_latents(tuned, sae, bad[:4], good[:4], paired=True),
        direction=mean_difference(tuned, sae_site(sae), bad, good),
        sae=sae,
    )
    rows = {(row["first"], row["second"]): row for row in found.overlap(100).iter_rows(named=True)}
    assert len(rows) == 10
    assert rows["delta", "rate_delta"]["share"] > 0.3
    assert rows["delta", "cosine"]["share"] < 0.2
    assert rows["delta", "cosine"]["chance"] == pytest.approx(100 / 8192)
