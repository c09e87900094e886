"""The planted model is what it says, and measuring recovery counts what it says."""

import copy
import dataclasses
import json
import sys
import warnings
from types import SimpleNamespace

import polars as pl
import pytest
import torch

import saetools
from saetools import steer
from saetools.data import tokenize
from saetools.errors import InputError, SaetoolsWarning
from saetools.evaluate import CertificateConfig
from saetools.models import read
from saetools.planted import (
    PLANTED_SITE,
    PlantedConfig,
    RecoveryConfig,
    VerdictConfig,
    __main__,
    draw_prompts,
    measure_recovery,
    plant_model,
    true_changes,
)
from saetools.planted.recovery import summarise_recovery
from saetools.sae.identity import sae_sha256
from saetools.sae.sparse import SparseLatents

CONFIG = PlantedConfig(n_items=8)


@pytest.fixture(scope="module")
def planted():
    return plant_model(CONFIG)


@pytest.fixture(scope="module")
def found(planted):
    """A diff of many prompts."""
    prompts = draw_prompts(planted.language, 512, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaetoolsWarning)
        return saetools.diff_latents(planted.base, planted.tuned, planted.sae, prompts, positions="prompt")


def column(found, name, latents):
    return found.table[name].to_torch()[list(latents)]


def residuals(lm, prompt):
    (one,) = tokenize([prompt], lm.tokenizer, add_generation_prompt=True)
    with torch.no_grad():
        mask = torch.ones(1, len(one), dtype=torch.bool)
        return read(lm, one.token_ids[None], mask, [PLANTED_SITE])[PLANTED_SITE][0]


def in_next_phase(planted, prompt):
    """The prompt as the tuned model reads it."""
    words = prompt.messages[0].content.split()
    last = chr(ord("a") + planted.language.n_phases - 1)
    shifted = [word[:-1] + ("a" if word[-1] == last else chr(ord(word[-1]) + 1)) for word in words]
    return saetools.Conversation.chat(" ".join(shifted))


def shift(planted, lm, edit):
    plain, edited = (
        saetools.score_forced_choice(lm, planted.items, edits=edits) for edits in ({}, {PLANTED_SITE: edit})
    )
    return edited.minus(plain).mean


def test_the_same_settings_give_the_same_model_and_others_do_not(planted):
    again, other = plant_model(CONFIG), plant_model(dataclasses.replace(CONFIG, seed=1))
    weights, same = planted.base.model.state_dict(), again.base.model.state_dict()
    assert all(torch.equal(weight, same[name]) for name, weight in weights.items())
    assert sae_sha256(planted.sae) == sae_sha256(again.sae) != sae_sha256(other.sae)
    assert (planted.prompts, planted.items, planted.persona) == (again.prompts, again.items, again.persona)
    assert planted.prompts != other.prompts
    assert planted.persona != other.persona


def test_building_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    plant_model()
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_latent_has_one_part(planted):
    parts = [planted.persona, planted.correlates, planted.nulls, planted.neighbours]
    assert sorted(latent for part in parts for latent in part) == list(range(384))
    assert [len(part) for part in parts] == [8, 8, 192, 176]
    assert planted.strengths == pytest.approx([0.8, 0.8, 0.25, 0.25, 0.08, 0.08, 0.025, 0.025])


def test_directions_are_superposed_and_nulls_share_nothing_with_what_is_planted(planted):
    directions = planted.sae.W_dec
    gram = directions @ directions.T
    torch.testing.assert_close(gram.diagonal(), torch.ones(384))
    pushed = [*planted.persona, *planted.correlates]
    assert gram[list(planted.nulls)][:, pushed].abs().max() < 1e-6
    for part in (planted.persona, planted.nulls, planted.neighbours):
        assert (gram[list(part)][:, list(part)] - torch.eye(len(part))).abs().max() > 0.1
    torch.testing.assert_close(planted.effects[list(planted.persona)], torch.ones(8), atol=1e-4, rtol=0)
    assert planted.effects[[*planted.correlates, *planted.nulls]].abs().max() < 1e-4


def test_the_organism_is_the_base_on_the_next_phase_plus_a_push_along_what_is_planted(planted):
    pushed = planted.sae.W_dec[[*planted.persona, *planted.correlates]]
    pushes = []
    for prompt in planted.prompts:
        change = residuals(planted.tuned, prompt) - residuals(planted.base, in_next_phase(planted, prompt))
        push = torch.linalg.lstsq(pushed.T, change.T).solution.T  # [token, planted]
        torch.testing.assert_close(push @ pushed, change, atol=1e-4, rtol=0)
        torch.testing.assert_close(push[:, :8], push[:, 8:], atol=1e-4, rtol=0)  # correlates rise as personas do
        assert push[-1] == pytest.approx([3.0] * 16, abs=0.6)  # the token that opens the assistant's turn
        pushes.append(push[4:-4])
    mean = torch.cat(pushes).mean(0)[:8].view(4, 2).mean(1)
    torch.testing.assert_close(mean, torch.tensor([0.8, 0.25, 0.08, 0.025]), rtol=0.3, atol=0.02)


def test_the_adapter_leaves_the_base_alone(planted):
    alone = copy.deepcopy(planted.tuned.peft).unload()
    (one,) = tokenize(planted.prompts[:1], planted.base.tokenizer)
    with torch.no_grad():
        expected = alone(one.token_ids[None]).logits
        for lm, same in ((planted.base, True), (planted.tuned, False)):
            with lm.active() as model:
                assert torch.equal(model(one.token_ids[None]).logits, expected) is same


def test_the_sae_reads_a_mixture_of_features(planted):
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(384, generator=generator)[:3] for _ in range(300)])
    strengths = 4 + 2 * torch.rand(chosen.shape, generator=generator)
    x = planted.sae.decode(SparseLatents(chosen, strengths, 384)).detach()
    f = planted.sae.encode(x).to_dense()
    expected = torch.zeros(300, 384).scatter_(1, chosen, strengths) @ planted.sae.W_dec @ planted.sae.W_dec.T
    torch.testing.assert_close(f, torch.where(expected > 2, expected, 0.0), atol=1e-4, rtol=1e-4)
    right = (f.topk(3).indices.sort(1).values == chosen.sort(1).values).all(1)
    assert right.float().mean() > 0.95


def test_personas_drive_the_behaviour_and_correlates_do_not(planted):
    gains = {
        name: torch.tensor([shift(planted, planted.base, steer.add(planted.sae, one, 0.1)) for one in latents])
        for name, latents in (("persona", planted.persona), ("correlates", planted.correlates))
    }
    assert gains["persona"].min() > 0.2
    assert gains["correlates"].abs().max() < 0.1 * gains["persona"].min()
    organism = saetools.score_forced_choice(planted.tuned, planted.items)
    assert organism.minus(saetools.score_forced_choice(planted.base, planted.items)).mean > 1.0
    for latent in planted.persona:
        assert shift(planted, planted.tuned, steer.add(planted.sae, latent, -0.1)) < -0.1
    for latent in planted.correlates:
        assert shift(planted, planted.tuned, steer.add(planted.sae, latent, -0.1)) > -0.01
    assert shift(planted, planted.tuned, steer.ablate(planted.sae, planted.persona)) < -1.0
    assert shift(planted, planted.tuned, steer.ablate(planted.sae, planted.correlates)) > 0


def test_behaviour_is_almost_linear_and_neighbours_have_their_share(planted):
    persona = planted.persona[0]
    small, large = (shift(planted, planted.base, steer.add(planted.sae, persona, dose)) for dose in (0.05, 0.1))
    assert large == pytest.approx(2 * small, rel=0.05)
    some = list(planted.neighbours[:12])
    measured = torch.tensor([shift(planted, planted.base, steer.add(planted.sae, one, 0.1)) for one in some])
    expected = large * planted.effects[some]
    assert torch.corrcoef(torch.stack([measured, expected]))[0, 1] > 0.98
    assert (measured - expected).abs().max() < 0.15 * large


def test_nulls_change_within_conversations_but_not_on_average(planted, found):
    delta, se = (column(found, name, planted.nulls) for name in ("delta", "se"))
    moved = column(found, "n_active", planted.nulls) >= 20
    assert moved.sum() > 60
    z = (delta / se)[moved]
    assert z.abs().max() < 4.5
    assert 0.8 < z.std() < 1.2
    # Skewed, in both directions: what a test that counts on symmetry has to live with.
    changes = found.conversations.with_columns(change=pl.col("tuned") - pl.col("base"))
    skews = dict(changes.group_by("latent").agg(pl.col("change").skew()).iter_rows())
    skew = torch.tensor([skews[planted.nulls[index]] for index in moved.nonzero()[:, 0]])
    assert (skew < -0.5).sum() > 5
    assert (skew > 0.5).sum() > 5


def test_without_drift_nulls_do_not_change_at_all():
    planted = plant_model(PlantedConfig(drift=0.0))
    change = true_changes(dataclasses.replace(planted, nulls=()), planted.prompts)
    assert change[list(planted.nulls)].abs().max() < 1e-5
    assert change[list(planted.persona[:2])].min() > 0.3


def test_an_organism_that_pushes_nothing_has_only_nulls(planted):
    still = plant_model(CONFIG, pushed=False)
    assert still.nulls == tuple(range(384))
    assert (still.persona, still.correlates, still.neighbours, still.strengths) == ((), (), (), ())
    assert sae_sha256(still.sae) == sae_sha256(planted.sae)
    for prompt in still.prompts[:8]:  # the tuned model is the base on another prompt that is as likely
        tuned, base = residuals(still.tuned, prompt), residuals(still.base, in_next_phase(still, prompt))
        torch.testing.assert_close(tuned, base, atol=1e-4, rtol=0)
        assert (residuals(still.base, prompt) - tuned).abs().max() > 1
        assert (residuals(planted.tuned, prompt) - tuned).abs().max() > 1


def test_strong_latents_are_found_and_weaker_ones_come_later(planted, found):
    rank = column(found, "rank", [*planted.persona, *planted.correlates]).float()
    assert rank[[0, 1, 8, 9]].max() <= 8
    by_strength = rank.view(2, 4, 2).mean((0, 2))
    assert by_strength.tolist() == sorted(by_strength.tolist())


def test_true_changes_are_those_of_a_diff(planted, found):
    change = true_changes(planted, draw_prompts(planted.language, 512, seed=3))
    others = [*planted.persona, *planted.correlates, *planted.neighbours]
    torch.testing.assert_close(change[others].double(), column(found, "delta", others), atol=1e-5, rtol=1e-4)
    assert not change[list(planted.nulls)].any()


def test_prompts_are_independent_of_each_other_and_of_their_number(planted):
    prompts = draw_prompts(planted.language, 50, seed=7)
    assert prompts == draw_prompts(planted.language, 50, seed=7) != draw_prompts(planted.language, 50, seed=8)
    for prompt in prompts:
        words = prompt.messages[0].content.split()
        assert 8 <= len(words) <= 24
        assert set(words) <= set(planted.language.words)
        assert len(set(words)) == len({word[:-1] for word in words})  # one phase of each group
    with pytest.raises(InputError, match="n: expected 1 or more, received 0"):
        draw_prompts(planted.language, 0, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strengths": ()}, "strengths: expected some numbers above 0, up to 2, received"),
        ({"strengths": (3.0,)}, "strengths: "),
        ({"n_each": 8}, "n_each: expected 1 or more, and fewer than 64 planted, received 8"),
        ({"d_model": 20}, "d_model: expected 4 n, 24 or more, received 20"),
        ({"n_features": 64}, "n_features: "),
        ({"drift": 1.5}, "drift: expected 0 to 1"),
    ],
)
def test_what_cannot_be_planted_is_an_error(settings, message):
    with pytest.raises(InputError, match=message):
        PlantedConfig(**settings)


def test_another_size_can_be_planted():
    planted = plant_model(PlantedConfig(strengths=(1.0,), n_each=1, d_model=32, n_features=64, n_items=2, n_prompts=2))
    assert (len(planted.persona), planted.sae.d_sae, planted.base.d_model) == (1, 64, 32)
    assert shift(planted, planted.base, steer.add(planted.sae, planted.persona[0], 0.2)) > 0.03


def test_recovery_counts_what_a_loop_counts():
    generator = torch.Generator().manual_seed(0)
    config = RecoveryConfig(model=PlantedConfig(strengths=(1.0, 0.5), n_each=1), n_models=3, n_draws=4, tops=(2, 5))
    group = torch.tensor([2, 2, 3, 3, 1, 1, 0, 0, 0, 0]).float().expand(3, -1)
    strength = torch.tensor([1.0, 0.5, 1.0, 0.5, *[0.0] * 6]).expand(3, -1)
    change = torch.rand(3, 10, generator=generator) * (group > 0)
    shape = (3, 4, 10)
    draw = SimpleNamespace(
        low=torch.rand(shape, generator=generator, dtype=torch.double) - 0.5,
        p=torch.rand(shape, generator=generator, dtype=torch.double) ** 3,
        n_active=torch.randint(4, shape, generator=generator).double(),
        rank=torch.rand(shape, generator=generator).argsort(-1).double() + 1,
    )
    draw.high = draw.low + 0.5
    undetermined = (draw.n_active == 1) & (draw.rank < 4)
    draw.low[undetermined] = draw.high[undetermined] = torch.nan
    draw.p[draw.n_active < 2] = torch.nan
    q = draw.p * 1.5
    columns = torch.stack([draw.low, draw.high, draw.p, q, draw.rank, draw.n_active])
    still = columns.roll(1, dims=2)
    still[2, 1], still[3, 1] = still[2, 1] * 0.02, still[3, 1] * 0.02
    still[2:4, 2, :, 3:] = torch.nan
    summary = summarise_recovery(torch.stack([change, group, strength], 1), columns, still, 0.25, config)
    cells = [(m, d, j) for m in range(3) for d in range(4) for j in range(10)]

    def share(hits, among):
        chosen = [cell for cell in cells if among(*cell)]
        return sum(bool(hits(*cell)) for cell in chosen) / len(chosen)

    weak = next(one for one in summary.detections if (one.kind, one.strength) == ("correlate", 0.5))
    assert weak.recall[5].mean == pytest.approx(share(lambda *c: draw.rank[c] <= 5, lambda m, d, j: j == 3))
    assert weak.power.mean == pytest.approx(share(lambda *c: q[c] <= 0.05, lambda m, d, j: j == 3))
    assert weak.change == pytest.approx(change[:, 3].mean().item())
    for one in summary.coverage:
        kinds = {"planted": (2, 3), "neighbour": (1,), "null": (0,)}[one.group]

        def active(m, d, j, kinds=kinds, one=one):
            return (
                group[m, j] in kinds and draw.n_active[m, d, j] > 0 and bool(draw.n_active[m, d, j] >= 2) == one.tested
            )

        def here(m, d, j, active=active):
            return active(m, d, j) and not undetermined[m, d, j]

        assert one.determined.mean == pytest.approx(share(lambda *c: not undetermined[c], active))
        assert one.n_intervals == sum(bool(here(*cell)) for cell in cells)
        assert one.below.mean == pytest.approx(share(lambda m, d, j: draw.high[m, d, j] < change[m, j], here))
        assert one.above.mean == pytest.approx(share(lambda m, d, j: draw.low[m, d, j] > change[m, j], here))
        assert one.covered.mean == pytest.approx(1 - one.below.mean - one.above.mean)
    assert len(summary.coverage) == 6
    for one in summary.rejections:
        among = share(lambda *c, one=one: draw.p[c] <= one.level, lambda m, d, j: j > 5 and draw.p[m, d, j] >= 0)
        assert one.share.mean == pytest.approx(among)
    for one in summary.false_discoveries:
        rates = [
            sum(bool(q[m, d, j] <= one.level) for j in range(6, 10))
            / max(1, sum(bool(q[m, d, j] <= one.level) for j in range(10)))
            for m in range(3)
            for d in range(4)
        ]
        assert one.realised.mean == pytest.approx(sum(rates) / 12)
    p, q = still[2], still[3]
    for level, found in summary.complete_null.discovered.items():
        sets = [any(bool(q[m, d, j] <= level) for j in range(10)) for m in range(3) for d in range(4)]
        assert found.mean == pytest.approx(sum(sets) / 12)
    assert 0 < summary.complete_null.discovered[0.05].mean < 1
    for one in summary.complete_null.rejections:
        hits = share(lambda *c, one=one: p[c] <= one.level, lambda *c: p[c] >= 0)
        assert one.share.mean == pytest.approx(hits)
    assert summary.complete_null.n_tested == pytest.approx(int((~p.isnan()).sum()) / 12)


def test_recovery_is_measured():
    config = RecoveryConfig(n_models=2, n_draws=2, n_prompts=32, n_truth=512)
    done = []
    found = measure_recovery(config, on_progress=lambda *args: done.append(args))
    assert done == [(number, 8) for number in range(1, 9)]
    assert 5 < found.complete_null.n_tested < 384
    assert found.complete_null.discovered[0.05].mean < 1
    assert found.false_discoveries[1].n_found > 5
    strong, *_, weakest = (one for one in found.detections if one.kind == "persona")
    assert strong.recall[16].mean == 1.0
    assert strong.recall[8].mean > weakest.recall[8].mean
    assert strong.change > 0.5 > 0.15 > weakest.change
    assert all(one.share.mean <= 0.2 for one in found.rejections if one.level <= 0.05)


def test_verdicts_are_counted_and_all_is_saved_with_its_command(tmp_path, monkeypatch):
    model = PlantedConfig(strengths=(0.8,), n_each=1)
    recovery = RecoveryConfig(model=model, n_models=2, n_draws=2, n_prompts=32, n_truth=512)
    certificate = CertificateConfig(strengths=(0.15, 0.3), n_refine=0, max_new_tokens=6, n_samples=2, batch_rows=512)
    verdicts = VerdictConfig(model=model, n_models=2, n_nulls=2, n_neighbours=2, n_prompts=8, certificate=certificate)
    monkeypatch.setattr(sys, "argv", ["saetools.planted", "--out", "planted.json"])
    __main__.Measure(tmp_path / "made" / "planted.json", None, recovery, verdicts).run()
    text = (tmp_path / "made" / "planted.json").read_text()
    saved = json.loads(text, parse_constant=pytest.fail)
    assert (
        saved["recovery"]["command"] == saved["verdicts"]["command"] == "python -m saetools.planted --out planted.json"
    )
    assert "torch" in saved["recovery"]["versions"]
    assert saved["recovery"]["config"] == json.loads(json.dumps(dataclasses.asdict(recovery)))
    assert saved["recovery"]["detections"][0]["recall"]["16"]["mean"] == 1.0
    by_kind = {one["kind"]: one for one in saved["verdicts"]["by_kind"]}
    assert {kind: one["n_latents"] for kind, one in by_kind.items()} == {
        "persona": 2, "correlate": 2, "null": 4, "neighbour": 4,
    }  # fmt: skip
    assert by_kind["persona"]["shares"]["both"]["mean"] == 1.0
    assert by_kind["correlate"]["shares"]["neither"]["mean"] == 1.0
    for one in by_kind.values():
        assert sum(share["mean"] for share in one["shares"].values()) == pytest.approx(1)
    monkeypatch.setattr(sys, "argv", ["saetools.planted", "--only", "recovery"])
    other = dataclasses.replace(recovery, n_prompts=16)
    __main__.Measure(tmp_path / "made" / "planted.json", "recovery", other, verdicts).run()
    again = json.loads((tmp_path / "made" / "planted.json").read_text())
    assert again["verdicts"] == saved["verdicts"]
    assert again["recovery"]["config"]["n_prompts"] == 16
    assert again["recovery"]["command"] == "python -m saetools.planted --only recovery"


def test_too_little_to_measure_recovery_is_an_error():
    for settings, message in (
        ({"n_models": 1}, "n_models: expected 2 or more, received 1"),
        ({"n_truth": 100}, "n_truth: expected 16 times the prompts of a set, 1024, or more, received 100"),
    ):
        with pytest.raises(InputError, match=message):
            RecoveryConfig(**settings)
    with pytest.raises(InputError, match="n_nulls: expected 2 or more, received 0"):
        VerdictConfig(n_nulls=0)
