"""Doses beside their random controls."""

import math
from dataclasses import replace

import pytest
import torch
from test_forced_choice import ITEMS
from tiny_sae import DEAD, make_sae

from saetools.errors import InputError
from saetools.evaluate import (
    ForcedChoiceScore,
    Perplexity,
    controls,
    dose_response,
    edit_norm,
    measure_perplexity,
    score_forced_choice,
)
from saetools.evaluate.forced_choice import rows_of_items
from saetools.models import LayerReplay, Site
from saetools.significance import draw_p_value
from saetools.steer import Scope, ablate, add, add_direction

SITE = Site(1)
TEXTS = ["The cat sat on the mat.", "Rain falls."]


@pytest.fixture(scope="module")
def lm(make_tiny):
    return make_tiny("llama")


def random_directions(seed, n=32):
    return torch.nn.functional.normalize(torch.randn(n, 32, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("tokens", ["all", "prompt"])
def test_every_dose_stands_beside_its_controls(lm, tokens):
    doses = {strength: add(make_sae(), [3, 4], strength).on(tokens) for strength in (0.4, -0.8)}
    done = []
    response = dose_response(lm, SITE, doses, ITEMS, TEXTS, seed=5, on_progress=lambda *args: done.append(args))
    assert [(point.strength, point.control) for point in response.points] == [
        (strength, control) for strength in doses for control in ("none", "equal_norm", "equal_perplexity")
    ]
    assert done[-1] == (6, 6)
    unedited = score_forced_choice(lm, ITEMS)
    assert response.score == unedited.mean
    assert response.perplexity == measure_perplexity(lm, TEXTS).value
    for own, norm, cost in (response.points[:3], response.points[3:]):
        fn = doses[own.strength]
        score = score_forced_choice(lm, ITEMS, edits={SITE: fn})
        assert (own.score, own.shift, own.against, own.n) == (score.mean, score.minus(unedited), None, 3)
        assert own.perplexity == measure_perplexity(lm, TEXTS, edits={SITE: fn}).value
        assert own.norm == pytest.approx(float(fn.parts[0].change.vector().norm()), rel=1e-4)
        for control in (norm, cost):
            step = {SITE: controls.RandomPush(random_directions(5), control.norm, Scope((tokens,)))}
            controlled = score_forced_choice(lm, ITEMS, edits=step)
            assert control.score.mean == pytest.approx(controlled.mean.mean, abs=1e-6)
            assert control.against.mean == pytest.approx(score.minus(controlled).mean, abs=1e-6)
            assert control.perplexity == pytest.approx(measure_perplexity(lm, TEXTS, edits=step).value)
        assert norm.norm == own.norm


def test_controls_say_how_likely_one_more_of_them_does_as_much(lm):
    items = [replace(item, id=f"{item.id}{n}", question=f"{item.question} {n}") for n in range(3) for item in ITEMS]
    strong, none = (dose_response(lm, SITE, {1.0: add(make_sae(), 3, by)}, items, TEXTS) for by in (6.0, 1e-3))
    assert [point.chance is None for point in strong.points] == [True, False, False]
    assert all(0 < point.chance < 1 for response in (strong, none) for point in response.points[1:])
    own, control = strong.points[:2]
    pushed = controls.RandomPush(random_directions(0, n=4), control.norm, Scope())
    scores = [
        score_forced_choice(lm, items, edits={SITE: fn}, batch_rows=4).gaps for fn in (add(make_sae(), 3, 6.0), pushed)
    ]
    way = 1 if own.shift.mean >= 0 else -1
    expected = draw_p_value(way * (scores[0] - scores[1]), rows_of_items(lm, items, 4))
    assert control.chance == pytest.approx(expected, abs=1e-6)


def test_a_known_score_of_the_unedited_model_is_used(lm):
    doses = {1.0: ablate(make_sae(), DEAD)}
    known = ForcedChoiceScore(torch.ones(3), tuple(item.id for item in ITEMS), ("a", "b", "a"))
    response = dose_response(lm, SITE, doses, ITEMS, TEXTS, unedited=known)
    assert response.score == known.mean
    plain = score_forced_choice(lm, ITEMS)
    for point in response.points:  # an edit without effect, and so are its controls
        assert (point.norm, point.score, point.shift) == (0, plain.mean, plain.minus(known))
        assert point.perplexity == response.perplexity


def test_the_norm_of_an_edit(lm):
    step = 3 * random_directions(0)[0]
    for fn in (
        add_direction(step, -1.0),
        add_direction(step, 1.0).on(skip_first=False),
        lambda acts, where: acts + step,
    ):
        assert edit_norm(lm, SITE, fn, TEXTS) == pytest.approx(3, rel=1e-4)
    assert edit_norm(lm, SITE, lambda acts, where: acts, TEXTS) == 0


def test_doses_that_cannot_be_controlled_are_errors(lm):
    with pytest.raises(InputError, match="doses: expected at least one strength"):
        dose_response(lm, SITE, {}, ITEMS, TEXTS)
    mixed = add(make_sae(), 3, 1.0) + add(make_sae(), 3, 1.0).on("prompt")
    with pytest.raises(InputError, match="doses: expected edits whose parts touch the same tokens"):
        dose_response(lm, SITE, {1.0: mixed}, ITEMS, TEXTS)
    answers_only = {1.0: add(make_sae(), 3, 1.0).on("response")}
    with pytest.raises(InputError, match=r"received add 3=1\*norm on response; edit all"):
        dose_response(lm, SITE, answers_only, ITEMS, TEXTS)


CURVES = {
    "square": lambda scale: min(20, 3 + scale**2),
    "line": lambda scale: 3 + scale,
    "cliff": lambda scale: 3 + 4 / (1 + math.exp(-8 * (scale - 2))),
    "dip": lambda scale: 3 - 0.5 * scale * math.exp(-scale) + 0.02 * scale**2,
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("start", [0.2, 2.0, 30.0])
def test_the_scale_of_equal_perplexity_is_found(lm, monkeypatch, curve, start):
    calls = []

    def measure(_lm, _texts, *, edits, replay):
        calls.append(edits[SITE].length)
        return Perplexity(math.exp(CURVES[curve](calls[-1])), 1)

    monkeypatch.setattr(controls, "measure_perplexity", measure)
    search = controls.PerplexityCurve(
        lm, SITE, random_directions(0), Scope(), TEXTS, {0.0: math.exp(CURVES[curve](0.0))}, LayerReplay(lm, SITE)
    )
    for wanted in (3.1, 3.5, 4.0):
        scale = search.scale_for(math.exp(wanted), start=start)
        assert CURVES[curve](scale) == pytest.approx(wanted, abs=0.021), (wanted, calls)
    assert len(calls) <= 24
    assert search.scale_for(math.exp(2.9), start=start) == 0
    assert search.scale_for(math.exp(4.0), start=0.0) == 0


def test_a_perplexity_out_of_reach_gives_the_nearest(lm, monkeypatch):
    def measure(_lm, _texts, *, edits, replay):
        return Perplexity(math.exp(3 + min(0.2, edits[SITE].length)), 1)

    monkeypatch.setattr(controls, "measure_perplexity", measure)
    search = controls.PerplexityCurve(
        lm, SITE, random_directions(0), Scope(), TEXTS, {0.0: math.exp(3)}, LayerReplay(lm, SITE)
    )
    assert search.at(search.scale_for(math.exp(5), start=0.1)) == pytest.approx(math.exp(3.2))
