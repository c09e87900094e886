"""Adequacy: planted changes inside and outside of what an SAE can say are told apart, by the formulas' own numbers."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from planted_diff import adequacy as seeing
from tiny_sae import basis_sae, make_sae

from saetools.activations import ActivationBlock
from saetools.adequacy import Adequacy, AdequacySums, random_rows
from saetools.data import Role
from saetools.models import Site
from saetools.sae.model import SAE, SAEMetadata
from saetools.sae.nonlinearity import TopK
from saetools.stats import Estimate, estimate_ratios

SITE = Site(1)
D, N = 32, 400


@pytest.fixture
def sae():
    """40 random directions, of which four are active at a time."""
    generator = torch.Generator().manual_seed(0)
    out = SAE(D, 40, TopK(4), metadata=SAEMetadata(site=str(SITE)))
    rows = torch.nn.functional.normalize(torch.randn(40, D, generator=generator), dim=1)
    with torch.no_grad():
        out.W_dec.copy_(rows)
        out.encoder.copy_(rows)
    return out


def measure(sae, base, tuned, *, documents=None, roles=None, parts=1, seed=0):
    documents = torch.arange(len(base)) // 10 if documents is None else documents
    roles = torch.full((len(base),), int(Role.PROMPT), dtype=torch.uint8) if roles is None else roles
    names = ("prompt", "response") if bool((roles != Role.PROMPT).any()) else ("prompt",)
    sums = AdequacySums(sae, SITE, int(documents.max()) + 1, names, seed=seed)
    edges = torch.linspace(0, len(base) // 10, parts + 1).long().tolist()
    for start, end in itertools.pairwise(edges):
        part = slice(10 * start, 10 * end)
        n = len(base[part])
        rest = (torch.zeros(n, dtype=torch.long), roles[part], documents[part], torch.arange(n))
        blocks = [ActivationBlock({SITE: x[part]}, *rest) for x in (base, tuned)]
        sums.add(*blocks, *(sae.encode(x[part]) for x in (base, tuned)))
    return sums.figures(n_resamples=200, seed=0)


def mixture(sae, n=N, *, seed=0):
    """Sums of four rows each, which the SAE reconstructs well but not exactly."""
    generator = torch.Generator().manual_seed(seed)
    strengths = torch.zeros(n, sae.d_sae)
    chosen = torch.rand(n, sae.d_sae, generator=generator).topk(4).indices
    strengths.scatter_(1, chosen, 3 + torch.rand(n, 4, generator=generator))
    return strengths @ sae.W_dec.detach()


def test_a_change_along_active_rows_is_seen(sae):
    base = mixture(sae)
    own = sae.encode(base)
    tuned = base + 0.5 * sae.W_dec.detach()[own.indices[:, 0]]
    found = measure(sae, base, tuned)["prompt"]
    assert found.in_active_rows.mean > 0.999
    assert 0.05 < found.in_random_rows.mean < 0.4
    assert not any("blind" in text for text in found.warnings)
    assert found.n_tokens == N
    assert found.l0_base.mean == pytest.approx(4)


def test_a_change_outside_of_all_active_rows_is_not(sae):
    base = mixture(sae)
    direction = torch.zeros(D)
    direction[0] = 1.0
    rows = torch.cat([sae.encode(base).indices], 1)
    bases = torch.linalg.qr(sae.W_dec.detach()[rows].mT).Q  # what is left of the direction beside each token's rows
    left = direction - (bases @ (bases.mT @ direction[:, None]))[..., 0]
    with torch.no_grad():
        tuned = base + 0.01 * left
    found = measure(sae, base, tuned)["prompt"]
    assert found.in_active_rows.mean < 0.01
    assert found.in_random_rows.mean > 0.05
    assert found.rest_shares[0] > 0.8
    assert abs(float(found.rest_directions[0] @ direction)) > 0.95
    assert "the SAE is blind to the change" in found.warnings[0]


def test_numbers_are_those_of_the_formulas(sae):
    base = mixture(sae)
    tuned = base + 0.3 * torch.randn(N, D, generator=torch.Generator().manual_seed(9))
    found = measure(sae, base, tuned, parts=3)["prompt"]
    with torch.no_grad():
        recon = [sae(x).double() for x in (base, tuned)]
    x = [side.double() for side in (base, tuned)]
    fvu = [
        float((side - own).square().sum() / (side - side.mean(0)).square().sum())
        for side, own in zip(x, recon, strict=True)
    ]
    assert (found.fvu_base.mean, found.fvu_tuned.mean) == pytest.approx(fvu, rel=1e-4)
    change = x[1] - x[0]
    error = (change - (recon[1] - recon[0])).square().sum()
    assert found.reproduced.mean == pytest.approx(float(1 - error / change.square().sum()), rel=1e-4)
    assert found.change.mean == pytest.approx(
        float(change.square().sum() / (x[0] - x[0].mean(0)).square().sum()), rel=1e-4
    )
    inside, rest = 0.0, torch.zeros(D, D, dtype=torch.double)
    for row in range(N):
        rows = torch.cat([sae.encode(side[row : row + 1]).indices[0] for side in (base, tuned)]).unique()
        solution = torch.linalg.lstsq(sae.W_dec.detach()[rows].double().T, change[row]).solution
        left = change[row] - solution @ sae.W_dec.detach()[rows].double()
        inside += float(change[row].square().sum() - left.square().sum())
        rest += torch.outer(left, left)
    assert found.in_active_rows.mean == pytest.approx(inside / float(change.square().sum()), rel=1e-3)
    shares = torch.linalg.eigvalsh(rest).flip(0)[:5] / change.square().sum()
    assert found.rest_shares == pytest.approx(shares.tolist(), rel=1e-3)
    per_conversation = [
        part.reshape(-1, 10).sum(1) for part in (change.square().sum(1), (x[0] - x[0].mean(0)).square().sum(1))
    ]
    ours = estimate_ratios(per_conversation[0][:, None], per_conversation[1][:, None], n_resamples=200, seed=0)[0]
    assert found.change.low == pytest.approx(ours.low, rel=1e-3)
    assert found.change.se == pytest.approx(ours.se, rel=1e-3)


def test_roles_are_apart(sae):
    base = mixture(sae)
    roles = torch.full((N,), int(Role.PROMPT), dtype=torch.uint8)
    roles[N // 2 :] = int(Role.RESPONSE)
    tuned = base.clone()
    tuned[N // 2 :] += 8 * sae.W_dec.detach()[3]
    found = measure(sae, base, tuned, roles=roles)
    assert found["prompt"].warnings == ("the two models are equal at this site",)
    assert not any("blind" in text for text in found["response"].warnings)
    alone = measure(sae, base[N // 2 :], tuned[N // 2 :])["prompt"]
    assert found["response"].fvu_tuned.mean == pytest.approx(alone.fvu_tuned.mean, rel=1e-5)


def test_an_sae_that_does_not_fit_the_tuned_model_is_named(sae):
    base = mixture(sae)
    tuned = base + 10 * torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    found = measure(sae, base, tuned)["prompt"]
    assert any("does not fit the tuned model" in text for text in found.warnings)


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "relu"])
def test_every_kind_of_sae(kind):
    sae = make_sae(kind)
    base = torch.randn(60, D, generator=torch.Generator().manual_seed(2))
    found = measure(sae, base, base + 0.2)["prompt"]
    assert 0 < found.in_active_rows.mean <= 1
    if kind != "topk":
        assert found.l0_base.mean != found.l0_tuned.mean


def test_all_rows_hold_every_change():
    base = torch.randn(60, D, generator=torch.Generator().manual_seed(3))
    found = measure(basis_sae(signs=(1, -1)), base, 1.1 * base)["prompt"]
    assert found.in_active_rows.mean == pytest.approx(1, abs=1e-3)
    assert found.reproduced.mean == pytest.approx(1, abs=1e-3)


def test_it_survives_json_also_without_a_change(sae):
    base = mixture(sae)
    for tuned in (base + 1, base):
        found = measure(sae, base, tuned)["prompt"]
        text = json.dumps(found.to_json(), allow_nan=False)
        again = Adequacy.from_json(json.loads(text), found.rest_directions)
        assert json.dumps(again.to_json()) == text
    assert math.isnan(again.reproduced.mean)


@pytest.mark.parametrize(("d_sae", "n_slots"), [(40, 6), (8, 6), (5, 5), (9, 0)])
def test_random_rows_are_as_many_others_without_repeats(d_sae, n_slots):
    generator = torch.Generator().manual_seed(4)
    n = 3000
    order = torch.rand(n, d_sae, generator=generator).argsort(1)[:, :n_slots]
    active = torch.where(torch.rand(n, n_slots, generator=generator) < 0.3, -1, order)
    counts = torch.zeros(d_sae)
    for part in active.split(100):
        for own, found in zip(part.tolist(), random_rows(part, d_sae, generator).tolist(), strict=True):
            known, drawn = set(own) - {-1}, [row for row in found if row >= 0]
            assert len(drawn) == len(set(drawn)) == min(len(known), d_sae - len(known))
            assert not known & set(drawn)
            counts[drawn] += 1
    if n_slots and d_sae > n_slots:  # all alike: by chance they differ by far less than a quarter
        assert counts.min() > 0.75 * counts.mean()
        assert counts.max() < 1.25 * counts.mean()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"reproduced": (0.15, 0.12, 0.18)}, "misses most of the change: its reconstructions reproduce 15% [12%, 18%]"),
        ({"reproduced": (0.15, 0.05, 0.25)}, None),
        ({"in_active_rows": (0.34, 0.33, 0.35)}, "blind to the change: 34% of it"),
        ({"in_active_rows": (0.40, 0.39, 0.41)}, None),
        ({"fvu_tuned": (0.3, 0.25, 0.35)}, "does not fit the tuned model: FVU 0.300 there"),
        ({"fvu_tuned": (0.3, 0.1, 0.5)}, None),
        ({"fvu_base": (0.001, 0.001, 0.001), "fvu_tuned": (0.003, 0.003, 0.003)}, None),
    ],
)
def test_warnings_heed_intervals_and_sizes(changes, said):
    estimates = {name: Estimate(mean, low, high, 0.01, 9) for name, (mean, low, high) in changes.items()}
    found = dataclasses.replace(seeing(), **estimates).warnings
    assert found == () if said is None else said in found[0]
