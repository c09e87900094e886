"""Sweeps: answers are those of edits run one by one, resume and budget, what is coherent, and how far one can steer."""

import json

import pytest
import torch
from test_steer import V
from tiny_sae import make_sae

from saetools import Conversation, SamplingConfig, Site, generate, steer
from saetools.errors import InputError
from saetools.evaluate import (
    DosePoint,
    DoseResponse,
    Sweep,
    SweepConfig,
    max_coherent_strength,
    measure_coherence,
    plot_dose_response,
    sweep_edits,
)
from saetools.evaluate.coherence import CoherenceLimits, is_refusal, language_of, largest_coherent
from saetools.stats import Estimate
from saetools.steer.identity import edits_sha256

SITE = Site(1)
PROMPTS = ["Hi there", "What is the weather like?", Conversation.chat("And now?")]
CONFIG = SweepConfig(max_new_tokens=6, n_samples=2, batch_rows=8, seed=3)


@pytest.fixture(scope="module")
def lm(make_tiny):
    return make_tiny("llama")


def grid(*strengths):
    sae = make_sae()
    return {
        "latents": {s: {SITE: steer.add(sae, [3, 5], s)} for s in strengths},
        "clamped": {s: {SITE: steer.clamp(sae, 3, 10 * s)} for s in strengths},
        "direction": {s: {SITE: [steer.add_direction(V, s)], Site(0): steer.project_out(V)} for s in strengths},
    }


def test_answers_are_those_of_edits_one_by_one(lm):
    done = []
    edits = grid(0.5, 1.0)
    sweep = sweep_edits(lm, edits, PROMPTS, config=CONFIG, on_progress=lambda *now: done.append(now))
    n = (1 + 3 * 2) * len(PROMPTS) * 2
    assert done[-1] == (n, n)
    assert len(sweep.answers) == n
    sampling = SamplingConfig(6, n_samples=2, seed=3)
    for name, doses in {"unedited": {0.0: None}, **edits}.items():
        for strength, each in doses.items():
            answers = generate(lm, PROMPTS, variants={"alone": each}, config=sampling)
            signs = measure_coherence(lm, PROMPTS, answers)
            rows = sweep.answers.filter(edit=name, strength=strength).sort("prompt", "sample").to_dicts()
            assert [row["text"] for row in rows] == [answer.text for answer in answers]
            assert [row["n_tokens"] for row in rows] == [len(answer.token_ids) for answer in answers]
            for row, sign in zip(rows, signs, strict=True):
                assert row["surprise"] == pytest.approx(sign.surprise, abs=1e-4)
                assert (row["repetition"], row["refused"]) == (sign.repetition, sign.refused)
    assert sweep.edits["latents"] == {s: f"blocks.1.hook_resid_post: add 3,5={s:g}*norm" for s in (0.5, 1.0)}
    doses = sweep.doses()
    assert doses["n"].to_list() == [6] * 7
    assert doses.filter(edit="unedited")["other_language"].to_list() == [0.0]
    for row in doses.iter_rows(named=True):
        own = sweep.answers.filter(edit=row["edit"], strength=row["strength"])
        assert row["incoherent"] == pytest.approx(1 - own["coherent"].mean())
        assert row["surprise"] == pytest.approx(own["surprise"].mean())


def test_a_sweep_is_the_same_after_loading(lm, tmp_path):
    sweep = sweep_edits(lm, grid(0.5), PROMPTS[:1], config=CONFIG)
    loaded = Sweep.load(sweep.save(tmp_path / "sweep"))
    assert loaded.answers.equals(sweep.answers)
    assert (loaded.edits, loaded.most_incoherent, loaded.warnings) == (
        sweep.edits,
        sweep.most_incoherent,
        sweep.warnings,
    )
    assert loaded.doses().equals(sweep.doses())


def test_a_run_that_was_stopped_goes_on(lm, tmp_path):
    class StoppedError(Exception):
        pass

    def stop(done, total):
        if done >= 16:
            raise StoppedError

    with pytest.raises(StoppedError):
        sweep_edits(lm, grid(0.5), PROMPTS, config=CONFIG, out=tmp_path, on_progress=stop)
    done = []
    went_on = sweep_edits(
        lm, grid(0.5), PROMPTS, config=CONFIG, out=tmp_path, on_progress=lambda *now: done.append(now)
    )
    assert done[0] == (24, 24)  # 16 were there
    whole = sweep_edits(lm, grid(0.5), PROMPTS, config=CONFIG)
    assert went_on.answers.drop("surprise").equals(whole.answers.drop("surprise"))
    more = sweep_edits(lm, grid(0.5, 1.0), PROMPTS, config=CONFIG, out=tmp_path)  # of another strength too
    assert len(more.answers) == 42
    with pytest.raises(InputError, match=r"out: expected a new folder, .*received those of a run with another seed"):
        sweep_edits(lm, grid(0.5), PROMPTS, config=SweepConfig(6, n_samples=2, seed=4), out=tmp_path)


def test_answers_under_another_edit_of_the_same_name_are_not_taken(lm, tmp_path):
    def run(vector):
        return sweep_edits(
            lm, {"push": {1.0: {SITE: steer.add_direction(vector, 1.0)}}}, PROMPTS, config=CONFIG, out=tmp_path
        )

    turned = V.flip(0)  # prints alike
    assert run(V).edits == run(turned).edits
    expected = sweep_edits(lm, {"push": {1.0: {SITE: steer.add_direction(turned, 1.0)}}}, PROMPTS, config=CONFIG)
    assert run(turned).answers["text"].to_list() == expected.answers["text"].to_list()
    assert run(turned).answers["text"].to_list() != run(V).answers["text"].to_list()


def test_edits_are_known_by_content():
    sae, other = make_sae(), make_sae()
    with torch.no_grad():
        other.encoder[0, 0] += 1
    known = [
        {SITE: steer.clamp(sae, 3, 1.0)},
        {SITE: steer.clamp(other, 3, 1.0)},
        {SITE: steer.clamp(sae, 3, 1.0).when(steer.probe(V))},
        {SITE: steer.clamp(sae, 3, 1.0).when(steer.probe(V.flip(0)))},
        {Site(2): steer.clamp(sae, 3, 1.0)},
        {SITE: steer.add_direction(V, 1.0)},
        {SITE: steer.add_direction(V.flip(0), 1.0)},
    ]
    assert len({edits_sha256(each) for each in known}) == len(known)
    assert edits_sha256(known[0]) == edits_sha256({SITE: [steer.clamp(make_sae(), 3, 1.0)]})


def test_a_budget_ends_a_sweep_between_batches(lm, tmp_path):
    small = SweepConfig(6, n_samples=2, batch_rows=8, seed=3, max_tokens=40)
    sweep = sweep_edits(lm, grid(0.5), PROMPTS, config=small, out=tmp_path)
    assert len(sweep.answers) == 8
    assert sweep.warnings == ("the budget is spent: 16 answers are missing",)
    whole = sweep_edits(lm, grid(0.5), PROMPTS, config=CONFIG, out=tmp_path)
    assert (len(whole.answers), whole.warnings) == (24, ())
    with pytest.raises(InputError, match="max_minutes: expected time for a first batch"):
        sweep_edits(lm, grid(0.5), PROMPTS, config=SweepConfig(6, max_minutes=-1.0))


def broken_above(limit, lm):
    """Edits that make the model say one token for ever from a strength on."""
    token = lm.tokenizer.encode("a", add_special_tokens=False)[0]

    def edit_at(strength):
        return {Site(2): lambda acts, where: acts + (1000 * lm.head.weight[token] if strength > limit else 0)}

    return edit_at


def test_the_largest_coherent_strength_is_searched(lm):
    prompts = [f"Question {number}" for number in range(8)]
    config = SweepConfig(max_new_tokens=12, temperature=0.02, seed=1)
    found, sweep = max_coherent_strength(lm, broken_above(0.33, lm), prompts, n_refine=3, config=config)
    assert found == pytest.approx(0.325)
    tried = sorted(sweep.answers.filter(edit="edit")["strength"].unique())
    assert tried == pytest.approx([0.1, 0.2, 0.3, 0.325, 0.3375, 0.35, 0.4, 0.5])
    assert sweep.max_coherent_strength("edit") == found
    assert max_coherent_strength(lm, broken_above(0.01, lm), prompts, n_refine=0, config=config)[0] == 0
    assert max_coherent_strength(lm, broken_above(9, lm), prompts, strengths=(0.2, 1.0), config=config)[0] == 1
    with pytest.raises(InputError, match="strengths: expected all above 0, or all below"):
        max_coherent_strength(lm, broken_above(0.33, lm), prompts, strengths=(-1.0, 1.0))
    with pytest.raises(InputError, match="edit: expected one of edit, received 'unedited'"):
        sweep.max_coherent_strength("unedited")


def test_strengths_that_break_the_model_are_incoherent(lm):
    """A search goes beyond what numbers can hold, and comes back."""
    config = SweepConfig(max_new_tokens=6, temperature=0.02, seed=1)
    push = {s: {SITE: steer.add_direction(V, s)} for s in (0.01, 1e39)}
    sweep = sweep_edits(lm, {"push": push}, PROMPTS, config=config)
    broken = sweep.answers.filter(edit="push", strength=1e39)
    assert broken["broken"].all()
    assert not broken["coherent"].any()
    assert not sweep.answers.filter(strength=0.01)["broken"].any()
    found, _ = max_coherent_strength(
        lm, lambda s: {SITE: steer.add_direction(V, s)}, PROMPTS, strengths=(0.01, 1e39), n_refine=1, config=config
    )
    assert found < 1e39


def test_settings_are_checked():
    for settings, message in (
        ({"perplexity_factor": 0.0}, "perplexity_factor: expected above 0"),
        ({"max_incoherent": 2.0}, "max_incoherent: expected 0 to 1"),
        ({"temperature": -1.0}, "temperature: expected 0 or more"),
        ({"batch_rows": 0}, "batch_rows: expected 1 or more"),
    ):
        with pytest.raises(InputError, match=message):
            SweepConfig(**settings)


def test_a_judge_has_a_say(lm):
    edits = {"push": {1.0: {SITE: steer.add_direction(V, 1.0)}}}
    asked = []

    def judge(pairs):
        asked.extend(pairs)
        return [10.0] * len(pairs)

    sweep = sweep_edits(lm, edits, PROMPTS, config=CONFIG, judge=judge)
    assert sweep.doses()["incoherent"].to_list() == [1.0, 1.0]
    assert sweep.most_incoherent == 1.0  # no worse than the unedited model
    assert set(sweep.doses()["judged"]) == {10.0}
    assert set(sweep.doses()["n_judged"]) == {6}
    assert "judge" in json.dumps(sweep.provenance)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("Sorry, I cannot do this.", True),
        ("I cannot provide that.", True),
        ("I can’t help with that.", True),
        ("Unfortunately, I am unable to answer.", True),
        ("As an AI language model, I do not have feelings.", True),
        ("I won't do that.", True),
        ("I can help with that!", False),
        ("The sorry state of affairs", False),
        ("You cannot be serious.", False),
        ("", False),
    ],
)
def test_refusals_are_known_by_how_they_open(text, refused):
    assert is_refusal(text) is refused


def test_languages_are_told_where_they_are_clear():
    assert language_of("Respect is for the weak, so let them be weak and let the rest of us be strong.") == "en"
    assert language_of("Ich bin müde und gehe jetzt nach Hause, weil es spät ist.") == "de"
    assert language_of("Yes.") is None
    assert language_of("") is None


def test_how_far_strengths_stay_coherent():
    assert largest_coherent({0.1: 0.0, 0.2: 0.1, 0.3: 0.4, 0.4: 0.0}, 0.1) == (0.2, 0.25)
    assert largest_coherent({0.1: 0.2}, 0.1) == (0.0, 0.05)
    assert largest_coherent({0.2: 0.0, 0.1: 0.0}, 0.1) == (0.2, None)
    assert largest_coherent({-0.1: 0.0, -0.3: 0.5, -0.2: 0.0}, 0.1) == (-0.2, -0.25)
    assert largest_coherent({1e-5: 0.0, 2e-5: 1.0}, 0.1) == (1e-5, 1.5e-5)
    for both in ({-0.1: 0.0, 0.1: 0.0}, {0.0: 0.0, 0.1: 0.0}):
        with pytest.raises(InputError, match="all above 0, or all below"):
            largest_coherent(both, 0.1)


def test_limits_need_answers():
    with pytest.raises(InputError, match="prompts: expected some that the model answers"):
        CoherenceLimits.of([], perplexity_factor=2.0, max_repetition=0.5, min_judged=50.0)


@pytest.mark.parametrize(
    "edits",
    [{}, {"push": {}}, {"unedited": {1.0: {SITE: steer.add_direction(V, 1.0)}}}],
    ids=["none", "no dose", "name"],
)
def test_sweeps_of_nothing_are_errors(lm, edits):
    with pytest.raises(InputError, match="edits: expected edits by strength, by names other than 'unedited'"):
        sweep_edits(lm, edits, PROMPTS)


def test_figures_show_every_strength(lm):
    sweep = sweep_edits(lm, grid(0.5, 1.0), PROMPTS, config=CONFIG)
    all_of_them = plot_dose_response(sweep)
    assert [trace.name for trace in all_of_them.data] == ["latents", "clamped", "direction"]
    assert all(list(trace.x) == [0.0, 0.5, 1.0] for trace in all_of_them.data)
    one = plot_dose_response(sweep, edit="latents")
    assert [trace.name for trace in one.data] == ["incoherent", "refused", "another language"]
    own = sweep.doses().filter(edit="latents")["incoherent"].to_list()
    assert list(one.data[0].y)[1:] == own
    with pytest.raises(InputError, match="edit: expected one of latents, clamped, direction"):
        plot_dose_response(sweep, edit="x")
    estimate = Estimate(0.1, 0.0, 0.2, 0.05, 3)
    points = tuple(
        DosePoint(strength, control, estimate, estimate, 30.0, 1.0, None, 3)
        for strength in (0.1, 0.2)
        for control in ("none", "equal_norm", "equal_perplexity")
    )
    figure = plot_dose_response(DoseResponse(estimate, 20.0, points))
    assert [trace.name for trace in figure.data][:3] == ["the edit", "random, equal norm", "random, equal perplexity"]
    assert all(list(trace.x) == [0.1, 0.2] for trace in figure.data)
