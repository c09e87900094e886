"""Fidelity against dense computations one conversation at a time, and SAEs whose fidelity is known."""

import dataclasses
import json
import math

import polars as pl
import pytest
import torch
from tiny_sae import basis_sae, make_sae, with_random_adapter

from saetools.data import POSITIONS, Conversation, select_positions, tokenize
from saetools.errors import InputError, NonFiniteError
from saetools.evaluate import DENSE_RATE, FREQUENCY_EDGES, measure_fidelity
from saetools.models import Site, edit, read
from saetools.stats import Estimate

SITE = Site(1)
CONVERSATIONS = [
    *(Conversation(text=text) for text in ("The cat sat on the mat.", "Rain.", "x", "An old house by the sea.")),
    Conversation.chat("Hi", "Hello there."),
    Conversation.chat("And now?", "Nothing, as ever.", system="Be brief."),
]


@pytest.fixture(scope="module")
def lm(make_tiny):
    return make_tiny("llama")


def by_hand(lm, sae, role, *, skip_first=True):
    """Figures of a role from whole matrices and from the model's own logits."""
    sae.requires_grad_(False)
    first = int(skip_first)
    pieces = list(tokenize(CONVERSATIONS, lm.tokenizer))
    everything = torch.cat([acts_of(lm, one)[first:] for one in pieces])
    fills = {
        "clean": lambda x: x,
        "sae": lambda x: sae.encode(x).to_dense() @ sae.W_dec + sae.b_dec,
        "mean": lambda x: everything.mean(0).expand_as(x),
        "zero": torch.zeros_like,
    }
    rows = []
    for one in pieces:
        chosen = select_positions(one.roles, role)
        chosen[:first] = False
        x = acts_of(lm, one)
        scores = {}
        for name, fill in fills.items():
            put = torch.cat([x[:first], fill(x[first:])])
            with torch.no_grad(), edit(lm, {SITE: lambda acts, where, put=put: put[None]}):
                scores[name] = lm.model(one.token_ids[None]).logits[0].log_softmax(-1)
        kl = {name: (scores["clean"].exp() * (scores["clean"] - own)).sum(-1) for name, own in scores.items()}
        ce = {name: -own[:-1].gather(1, one.token_ids[1:, None])[:, 0] for name, own in scores.items()}
        rows.append(
            {"x": x[chosen]}
            | {f"kl_{name}": values[chosen] for name, values in kl.items()}
            | {f"ce_{name}": values[chosen[:-1]] for name, values in ce.items()}
        )
    found = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    x = found.pop("x")
    f = sae.encode(x).to_dense()
    recon = f @ sae.W_dec + sae.b_dec
    m = {name: float(values.mean()) for name, values in found.items()}
    fvu = float((x - recon).square().sum() / (x - x.mean(0)).square().sum())
    rates = (f > 0).double().mean(0)
    return {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "cosine": float(torch.cosine_similarity(x, recon).mean()),
        "norm_ratio": float((recon.norm(dim=1) / x.norm(dim=1)).mean()),
        "l0": float((f > 0).sum(1).double().mean()),
        **{key: m[key] for key in ("ce_clean", "ce_sae", "ce_mean", "ce_zero", "kl_mean", "kl_zero")},
        "ce_recovered": (m["ce_zero"] - m["ce_sae"]) / (m["ce_zero"] - m["ce_clean"]),
        "ce_recovered_mean": (m["ce_mean"] - m["ce_sae"]) / (m["ce_mean"] - m["ce_clean"]),
        "kl": m["kl_sae"],
        "kl_recovered": 1 - m["kl_sae"] / m["kl_zero"],
        "kl_recovered_mean": 1 - m["kl_sae"] / m["kl_mean"],
        "dead": float((rates == 0).double().mean()),
        "dense": float((rates > DENSE_RATE).double().mean()),
        "histogram": tuple(histogram(rates)),
        "n_conversations": sum(len(row["x"]) > 0 for row in rows),
        "n_tokens": len(x),
        "n_predictions": len(found["ce_clean"]),
    }


def acts_of(lm, one):
    with torch.no_grad():
        return read(lm, one.token_ids[None], torch.ones(1, len(one), dtype=torch.bool), [SITE])[SITE][0]


def histogram(rates):
    counts = [0] * (len(FREQUENCY_EDGES) - 1)
    for rate in rates[rates > 0].tolist():
        inside = [i for i, edge in enumerate(FREQUENCY_EDGES[:-1]) if edge <= math.log10(rate)]
        counts[inside[-1] if inside else 0] += 1
    return counts


@pytest.mark.parametrize(
    ("kind", "skip_first", "batch_tokens"), [("topk", True, 40), ("jumprelu", True, 1), ("topk", False, 2048)]
)
def test_figures_are_those_of_a_dense_computation(lm, kind, skip_first, batch_tokens):
    sae = make_sae(kind)
    fidelity = measure_fidelity(lm, sae, CONVERSATIONS, site=SITE, batch_tokens=batch_tokens, skip_first=skip_first)
    assert tuple(fidelity.by_role) == POSITIONS
    for role, figures in fidelity.by_role.items():
        expected = by_hand(lm, sae, role, skip_first=skip_first)
        assert set(expected) == {field.name for field in dataclasses.fields(figures)}
        for name, value in expected.items():
            found = getattr(figures, name)
            if isinstance(found, Estimate):
                assert found.n == expected["n_conversations"]
                assert found.low <= found.mean <= found.high or name == "fvu"
                found = found.mean
            rel = 1e-2 if "recovered" in name else 1e-4  # this model loses next to nothing: a small denominator
            assert found == pytest.approx(value, rel=rel, abs=1e-5), (role, name)


def test_an_sae_that_keeps_everything(lm):
    here = measure_fidelity(lm, basis_sae(signs=(1, -1)), CONVERSATIONS, site=SITE).all
    assert here.fvu.mean == pytest.approx(0, abs=1e-9)
    assert here.l0.mean == pytest.approx(32, abs=0.1)
    assert [one.mean for one in (here.cosine, here.norm_ratio)] == pytest.approx([1, 1])
    recovered = (here.ce_recovered, here.ce_recovered_mean, here.kl_recovered, here.kl_recovered_mean)
    assert [one.mean for one in recovered] == pytest.approx([1] * 4, abs=1e-3)
    assert here.kl.mean == pytest.approx(0, abs=1e-5)


def test_an_sae_that_keeps_nothing(lm):
    sae = make_sae("topk")
    with torch.no_grad():
        sae.b_enc.fill_(-1000.0)
        sae.b_dec.zero_()
    here = measure_fidelity(lm, sae, CONVERSATIONS, site=SITE).all
    assert (here.l0.mean, here.dead, here.cosine.mean, sum(here.histogram)) == (0, 1, 0, 0)
    assert here.ce_sae == here.ce_zero
    assert [here.ce_recovered.mean, here.kl_recovered.mean] == pytest.approx([0, 0], abs=1e-6)


def test_an_sae_that_keeps_the_mean(lm):
    sae = make_sae("topk")
    with torch.no_grad():
        sae.b_enc.fill_(-1000.0)
        sae.b_dec.copy_(torch.cat([acts_of(lm, one)[1:] for one in tokenize(CONVERSATIONS, lm.tokenizer)]).mean(0))
    here = measure_fidelity(lm, sae, CONVERSATIONS, site=SITE).all
    assert here.fvu.mean == pytest.approx(1)
    assert [here.ce_recovered_mean.mean, here.kl_recovered_mean.mean] == pytest.approx([0, 0], abs=1e-5)


def test_figures_are_those_of_the_view(make_tiny, lm):
    tuned, sae = with_random_adapter(make_tiny("llama")), make_sae()
    of_base = measure_fidelity(tuned.base, sae, CONVERSATIONS).all
    assert of_base == measure_fidelity(lm, sae, CONVERSATIONS).all
    assert measure_fidelity(tuned, sae, CONVERSATIONS).all.ce_clean.mean != pytest.approx(of_base.ce_clean.mean, 1e-3)


def test_an_interval_narrows_with_conversations(lm):
    sae = make_sae()
    few, many = (measure_fidelity(lm, sae, CONVERSATIONS * times, seed=1).all for times in (4, 36))
    assert many.ce_sae.mean == pytest.approx(few.ce_sae.mean)
    assert many.ce_sae.high - many.ce_sae.low == pytest.approx((few.ce_sae.high - few.ce_sae.low) / 3, rel=0.2)
    again, other = (measure_fidelity(lm, sae, CONVERSATIONS * 4, seed=seed).all for seed in (1, 2))
    assert again == few
    assert other.ce_sae.low != few.ce_sae.low


def test_table_and_files(lm, tmp_path):
    steps = []
    fidelity = measure_fidelity(
        lm, make_sae(), CONVERSATIONS, max_tokens=60, batch_tokens=20, on_progress=lambda *now: steps.append(now)
    )
    assert steps == [(step, len(steps)) for step in range(1, len(steps) + 1)]
    table = fidelity.table()
    assert table["role"].to_list() == list(fidelity.by_role)
    response = table.row(by_predicate=pl.col("role") == "response", named=True)
    fvu = fidelity.by_role["response"].fvu
    assert (response["fvu"], response["fvu_low"], response["fvu_high"]) == (fvu.mean, fvu.low, fvu.high)
    assert fidelity.n_truncated > 0
    fidelity.save(tmp_path / "made")
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"fidelity.json", "fidelity.parquet"}
    assert pl.read_parquet(tmp_path / "made" / "fidelity.parquet").equals(table)
    facts = json.loads((tmp_path / "made" / "fidelity.json").read_text(encoding="utf-8"))
    assert facts["roles"]["all"]["histogram"] == list(fidelity.all.histogram)
    assert facts["provenance"]["site"] == str(SITE)


def test_a_single_conversation_has_no_interval(lm, tmp_path):
    fidelity = measure_fidelity(lm, make_sae(), [Conversation(text="The cat sat on the mat.")])
    assert list(fidelity.by_role) == ["prompt", "all"]
    assert math.isnan(fidelity.all.fvu.low)
    assert fidelity.table()["fvu_low"].to_list() == [None, None]
    fidelity.save(tmp_path)
    json.loads((tmp_path / "fidelity.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_what_cannot_be_measured_is_an_error(lm, make_tiny):
    with pytest.raises(InputError, match="conversations: expected tokens to predict"):
        measure_fidelity(lm, make_sae(), [Conversation(text="ab"), Conversation(text="a")])
    with pytest.raises(InputError, match="sae: expected an autoencoder of width 32"):
        measure_fidelity(lm, make_sae(d_in=16), CONVERSATIONS)
    with pytest.raises(InputError, match="site: expected a site"):
        measure_fidelity(lm, make_sae(site=""), CONVERSATIONS)
    broken = make_tiny("llama")
    broken.model.model.layers[0].mlp.down_proj.weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteError):
        measure_fidelity(broken, make_sae(), CONVERSATIONS)
