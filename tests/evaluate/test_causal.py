"""Certificates: planted causes are told from what only rises with them; every number can be computed again."""

import dataclasses
import inspect
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from certify_worker import CONFIG, certify

from saetools.diff import diff_latents
from saetools.errors import InputError, IntegrityError, SaetoolsWarning
from saetools.evaluate import (
    Candidate,
    Certification,
    CoherenceLimits,
    certify_latents,
    measure_coherence,
    measure_perplexity,
    score_forced_choice,
)
from saetools.evaluate.cells import Cells
from saetools.evaluate.coherence import AnswerCoherence, repetition
from saetools.evaluate.controls import RandomPush, matched_latents, random_directions
from saetools.generation import SamplingConfig, generate
from saetools.planted import PLANTED_SITE, PlantedConfig, draw_prompts, plant_model
from saetools.planted.weights import PUSH
from saetools.steer import Scope, add

WORKER = Path(__file__).parent / "certify_worker.py"


@pytest.fixture(scope="module")
def planted():
    return plant_model(PlantedConfig(strengths=(0.8, 0.25), n_items=32, n_prompts=32))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("certified")
    return certify(out), out


def test_causes_are_told_from_correlates(found, planted):
    by_name = {one.candidate.name: one for one in found[0].certificates}
    assert by_name[f"latent {planted.persona[0]}"].verdict == "both"
    assert by_name[f"latent {planted.persona[2]}"].verdict == "both"
    assert by_name["personas"].verdict == "both"
    assert by_name[f"latent {planted.correlates[0]}"].verdict == "neither"
    assert by_name[f"latent {planted.nulls[0]}"].verdict == "neither"
    assert by_name["personas"].induces.share.mean > 2 * by_name[f"latent {planted.persona[0]}"].induces.share.mean


def test_numbers_are_those_of_the_parts(found, planted):
    persona = planted.persona[0]
    effects = {"base": found[0].certificates[0].induces, "tuned": found[0].certificates[0].suppresses}
    plain = {side: score_forced_choice(getattr(planted, side), planted.items) for side in effects}
    shift = plain["tuned"].minus(plain["base"])
    assert found[0].shift.mean == pytest.approx(shift.mean, abs=1e-5)
    texts = [one.messages[0].content for one in draw_prompts(planted.language, 10, seed=8)]
    for side, effect in effects.items():
        lm, sign = getattr(planted, side), 1 if side == "base" else -1
        assert 0 < effect.strength < 2
        edits = {PLANTED_SITE: add(planted.sae, persona, sign * effect.strength)}
        own = score_forced_choice(lm, planted.items, edits=edits)
        assert effect.shift.mean == pytest.approx(own.minus(plain[side]).mean, abs=1e-4)
        assert effect.share.mean == pytest.approx(sign * effect.shift.mean / shift.mean, rel=1e-3)
        assert effect.perplexity == pytest.approx(measure_perplexity(lm, texts, edits=edits).value, rel=1e-3)
        norm = effect.strength * planted.sae.metadata.median_norm
        push = RandomPush(random_directions(CONFIG.n_directions, 128, seed=0), norm, Scope())
        control = score_forced_choice(lm, planted.items, edits={PLANTED_SITE: push}, batch_rows=CONFIG.n_directions)
        assert effect.against["equal_norm"].mean == pytest.approx(own.minus(control).mean, abs=1e-4)
        named = [*planted.persona, planted.correlates[0], planted.nulls[0]]
        others = matched_latents(planted.sae, [persona], rates_of(planted), CONFIG.n_matched, excluded=named)
        rows = planted.sae.directions()[others[:, 0]]
        push = RandomPush(rows, sign * norm, Scope())  # the way the candidate is pushed
        control = score_forced_choice(lm, planted.items, edits={PLANTED_SITE: push}, batch_rows=CONFIG.n_directions)
        assert effect.against["matched_latents"].mean == pytest.approx(own.minus(control).mean, abs=1e-4)
        moved = {PLANTED_SITE: lambda acts, where, way=sign: acts + way * PUSH * planted.sae.W_dec[persona]}
        carried = score_forced_choice(lm, planted.items, edits=moved).minus(plain[side])
        assert effect.carried.mean == pytest.approx(sign * carried.mean / shift.mean, rel=0.02)
        at_it = next(dose for dose in effect.doses if dose.strength == effect.strength)
        assert at_it.shift == effect.shift
        assert at_it.incoherent <= 0.1


def rates_of(planted):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return diff_latents(planted.base, planted.tuned, planted.sae, planted.prompts).rates()


def test_the_fine_tunes_own_change_of_all_personas_carries_its_shift(found, planted):
    by_name = {one.candidate.name: one for one in found[0].certificates}
    for effect in ("induces", "suppresses"):
        everything = getattr(by_name["personas"], effect).carried
        assert 0.7 < everything.mean < 1.4  # it is added to prompts, too, where the organism pushes less
        one = getattr(by_name[f"latent {planted.persona[0]}"], effect).carried
        assert 0.1 < one.mean < 0.4  # one of four that the organism pushes alike while it answers
        for other in (planted.correlates[0], planted.nulls[0]):
            assert abs(getattr(by_name[f"latent {other}"], effect).carried.mean) < 0.05


def briefly(planted, candidates, *, strengths=(0.15,), **settings):
    """A certification at few strengths."""
    texts = [one.messages[0].content for one in draw_prompts(planted.language, 10, seed=8)]
    models, prompts = (planted.base, planted.tuned, planted.sae), draw_prompts(planted.language, 10, seed=7)
    config = dataclasses.replace(CONFIG, strengths=strengths, n_refine=0)
    given = (*models, candidates, planted.items, prompts, texts)
    return certify_latents(*given, rates=rates_of(planted), config=config, **settings)


def test_a_lowered_latent_is_steered_the_other_way(planted):
    persona = planted.persona[0]
    ways = [Candidate("raised", (persona,)), Candidate("lowered", (persona,), sign=-1)]
    up, down = briefly(planted, ways).certificates
    assert (up.verdict, down.verdict) == ("both", "neither")
    assert down.induces.shift.mean < 0 < up.induces.shift.mean
    assert down.induces.against["matched_latents"].mean < 0


def test_another_candidate_of_the_same_name_is_measured_anew(planted, tmp_path):
    verdicts = [
        briefly(planted, [Candidate("both", latents)], out=tmp_path).certificates[0].verdict
        for latents in (planted.persona[:2], planted.correlates[:2])
    ]
    assert verdicts == ["both", "neither"]


def test_a_judge_counts_and_is_named(planted):
    prompts = draw_prompts(planted.language, 10, seed=7)
    plain = {row.text for row in generate(planted.base, prompts, config=SamplingConfig(6, n_samples=4, seed=0))}
    plain |= {row.text for row in generate(planted.tuned, prompts, config=SamplingConfig(6, n_samples=4, seed=0))}

    def stern(pairs):
        return [90.0 if answer in plain else 1.0 for _, answer in pairs]

    found = briefly(planted, [planted.persona[0]], strengths=(0.15, 0.3), judge=stern)
    assert found.certificates[0].verdict == "incoherent"
    assert math.isnan(found.certificates[0].induces.q_value)
    assert found.table()["induces_q"][0] is None
    assert found.certificates[0].induces.doses[0].n_judged == 40
    assert "stern" in found.provenance["judge"]
    with pytest.warns(SaetoolsWarning, match="the judge gave 0 of 160 answers a score") as caught:
        silent = briefly(planted, [planted.persona[0]], strengths=(0.15, 0.3), judge=lambda p: [None] * len(p))
    assert silent.warnings == (str(caught[0].message),)
    assert silent.certificates[0].verdict == "both"


def test_the_largest_coherent_strength_is_searched(found):
    for one in found[0].certificates:
        for effect in (one.induces, one.suppresses):
            strengths = [dose.strength for dose in effect.doses]
            assert strengths == sorted(strengths)
            assert set(CONFIG.strengths) < set(strengths)  # 2 breaks everything: one between was tried
            broken = [dose.strength for dose in effect.doses if dose.incoherent > CONFIG.max_incoherent]
            assert effect.strength == max([one for one in strengths if one < min(broken)], default=0.0)


def test_it_survives_a_file(found, tmp_path):
    certification, out = found
    for path in (out / "certification.json", certification.save(tmp_path / "copy.json")):
        assert Certification.load(path).to_json() == certification.to_json()
    text = (tmp_path / "copy.json").read_text()
    json.loads(text, parse_constant=pytest.fail)  # no NaN
    (tmp_path / "copy.json").write_text(text[:-20])
    with pytest.raises(IntegrityError, match="is damaged"):
        Certification.load(tmp_path / "copy.json")
    with pytest.raises(InputError, match="path: expected a certification"):
        Certification.load(tmp_path / "none.json")


def test_the_table_and_the_figure(found):
    table = found[0].table()
    assert table["verdict"].to_list() == ["both", "neither", "both", "neither", "both"]
    assert table["induces_share_low"].is_not_null().all()
    figure = found[0].figure("personas")
    doses = found[0].certificates[-1].induces.doses
    assert list(figure.data[0].x) == [dose.strength for dose in doses]
    with pytest.raises(InputError, match="candidate: expected one that was tested, received 'nobody'"):
        found[0].figure("nobody")


def test_a_spent_budget_leaves_candidates_untested_and_the_next_run_goes_on(found, tmp_path):
    for least in ({"max_tokens": 1}, {"max_minutes": 0.0}):
        with pytest.warns(SaetoolsWarning, match=r"the budget is spent: 5 of 5 candidates are untested"):
            none = certify(tmp_path, config=dataclasses.replace(CONFIG, **least))
        assert none.shift == found[0].shift
    with pytest.warns(SaetoolsWarning, match=r"the budget is spent: [1-4] of 5 candidates are untested") as caught:
        first = certify(tmp_path, config=dataclasses.replace(CONFIG, max_tokens=45_000))
    assert first.warnings == tuple(str(one.message) for one in caught if one.category is SaetoolsWarning)
    verdicts = [one.verdict for one in first.certificates]
    assert verdicts[-1] == "untested"
    with pytest.raises(InputError, match="one that was tested"):
        first.figure("personas")
    assert first.table()["induces_q"][-1] is None
    done = []
    again = certify(tmp_path, on_progress=lambda *args: done.append(args))
    assert [one.to_json() if hasattr(one, "to_json") else one for one in again.certificates] == list(
        found[0].certificates
    )
    assert done[-1][0] == done[-1][1]
    with pytest.raises(InputError, match=r"out: .*those of a run with another fdr, seed"):
        certify(tmp_path, config=dataclasses.replace(CONFIG, seed=1, fdr=0.1))


def test_a_killed_run_goes_on_to_the_same_result(found, tmp_path, kill_midway):
    assert kill_midway(WORKER, str(tmp_path), last=30)
    assert certify(tmp_path).certificates == found[0].certificates


def test_organisms_can_share_what_is_measured_of_the_base(found, tmp_path):
    first = certify(tmp_path / "a", shared=tmp_path / "base")
    assert first.certificates == found[0].certificates
    base = (tmp_path / "base" / "base.jsonl").read_bytes()
    assert not (tmp_path / "a" / "base.jsonl").exists()
    (tmp_path / "a" / "tuned.jsonl").unlink()
    assert certify(tmp_path / "b", shared=tmp_path / "base").certificates == found[0].certificates
    assert (tmp_path / "base" / "base.jsonl").read_bytes() == base


def test_half_a_line_is_measured_again(tmp_path):
    path = tmp_path / "cells.jsonl"
    cells = Cells(path, {"seed": 0})
    cells.add({"a": 1.5})
    cells.add({"b": [1, 2], "c": 3})
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        again = Cells(path, {"seed": 0})
        assert ("a" in again) >= ("b" in again)
        assert ("b" in again) == ("c" in again)
        again.add({"d": 4})
        assert Cells(path, {"seed": 0})["d"] == 4


def test_matched_latents_are_drawn_from_the_nearest(planted):
    rates = torch.linspace(0.001, 0.5, planted.sae.d_sae)
    norms = planted.sae.W_dec.detach().norm(dim=1)
    matched = matched_latents(planted.sae, [100, 200], rates, 4, excluded=[101])
    assert matched.shape == (4, 2)
    distance = ((rates.log() - rates[100].log()) ** 2 + (norms.log() - norms[100].log()) ** 2).sqrt()
    distance[[100, 101, 200]] = torch.inf
    nearest = set(distance.topk(16, largest=False).indices.tolist())
    drawn = {
        tuple(matched_latents(planted.sae, [100, 200], rates, 4, excluded=[101], seed=seed)[:, 0].tolist())
        for seed in range(20)
    }
    assert {latent for one in drawn for latent in one} == nearest
    assert all(len(set(one)) == 4 for one in drawn)
    twins = matched_latents(planted.sae, [100, 102, 104], rates, 300)
    assert all(len(set(row)) == 3 for row in twins.tolist())
    assert not {100, 102, 104} & set(twins.flatten().tolist())
    with pytest.raises(InputError, match="n_matched: expected at most 382, the latents that are no candidates"):
        matched_latents(planted.sae, [0, 1], rates, 400)


def test_coherence_is_that_of_the_base(planted):
    prompts = draw_prompts(planted.language, 3, seed=1)
    sampling = SamplingConfig(max_new_tokens=5, n_samples=2, seed=3)
    answers = generate(planted.tuned, prompts, config=sampling)
    asked = []

    def judge(pairs):
        asked.extend(pairs)
        return [50.0] * len(pairs)

    signs = measure_coherence(planted.base, prompts, answers, judge=judge)
    assert len(asked) == len({(answer.prompt, answer.token_ids) for answer in answers})
    for answer, sign in zip(answers, signs, strict=True):
        prompt = planted.base.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompts[answer.prompt].messages[0].content}],
            add_generation_prompt=True,
            return_dict=False,
        )
        ids = torch.tensor([[*prompt, *answer.token_ids]])
        with torch.no_grad(), planted.base.active():
            log_probs = planted.base.model(input_ids=ids).logits.log_softmax(-1)
        own = log_probs[0, len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])
        assert sign.surprise == pytest.approx(float(-own.mean()), abs=1e-4)
        assert sign.judged == 50.0
    with pytest.raises(InputError, match="judge: expected"):
        measure_coherence(planted.base, prompts, answers, judge=lambda pairs: [])


def test_signs_of_coherence():
    assert repetition([1, 2]) == 0
    assert repetition([1, 1, 1, 1]) == 0.5
    assert repetition([1, 2, 3, 1, 2, 3]) == 0.25
    limits = CoherenceLimits(surprise=3.0, repetition=0.5, judged=50.0)
    assert limits.holds(AnswerCoherence(3.0, 0.5, 50.0))
    assert limits.holds(AnswerCoherence(1.0, 0.0, None))
    for bad in ((3.1, 0.0, None), (None, 0.0, None), (1.0, 0.6, None), (1.0, 0.0, 49.0)):
        assert not limits.holds(AnswerCoherence(*bad))


def test_what_does_not_go_together_is_an_error(planted):
    def run(**changes):
        given = {
            "candidates": [1],
            "items": planted.items,
            "prompts": ["w0a"],
            "texts": ["w0a w1a w2a"],
            "rates": torch.ones(planted.sae.d_sae),
            "changes": None,
        } | changes
        unchecked = inspect.unwrap(certify_latents)  # types, and widths that have to be equal, are checked in tests
        unchecked(planted.base, planted.tuned, planted.sae, **given, config=CONFIG)

    for changes, message in (
        ({"candidates": []}, "candidates: expected latents of 0 to 383"),
        ({"candidates": [384]}, r"candidates: .*received \[384\]"),
        ({"candidates": [1, Candidate("latent 1", (2,))]}, "candidates: .*each name once"),
        ({"items": planted.items[:1]}, "items: expected four or more, received 1"),
        ({"prompts": []}, "prompts: expected one or more"),
        ({"rates": torch.ones(3)}, "rates: expected one for each of 384 latents, received 3"),
        ({"changes": torch.ones(3)}, "changes: expected one for each of 384 latents, received 3"),
        ({"texts": []}, "texts: expected one or more"),
    ):
        with pytest.raises(InputError, match=message):
            run(**changes)
    for changes, message in (
        ({"strengths": (0.3, 0.1)}, "strengths: expected ascending"),
        ({"n_matched": 0}, "n_matched: expected 1 or more, received 0"),
        ({"max_incoherent": 1.5}, "max_incoherent: expected 0 to 1"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(CONFIG, **changes)
    with pytest.raises(InputError, match="candidates: expected latents, and a sign"):
        Candidate("none", ())


def test_a_damaged_line_is_an_error(tmp_path):
    path = tmp_path / "cells.jsonl"
    cells = Cells(path, {"seed": 0})
    cells.add({"a": 1.5})
    cells.add({"b": 2})
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:4] + b"\n" + third)
    with pytest.raises(IntegrityError, match="is damaged"):
        Cells(path, {"seed": 0})
