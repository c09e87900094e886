"""The whole pipeline on a planted model: it ends with the planted causes, and a run goes on where it was."""

import json

import pytest

from saetools.errors import InputError
from saetools.evaluate import CertificateConfig
from saetools.persona import find_persona
from saetools.persona_stages import PersonaConfig
from saetools.planted import PlantedConfig, draw_prompts, plant_model

CONFIG = PersonaConfig(
    positions=("prompt",),
    role="prompt",
    n_candidates=4,
    n_listed=6,
    n_overlap=8,
    n_answer_tokens=4,
    n_resamples=200,
    certificate=CertificateConfig(strengths=(0.15, 0.3), n_refine=0, max_new_tokens=6, n_samples=2, batch_rows=512),
)


@pytest.fixture(scope="module")
def planted():
    return plant_model(PlantedConfig(strengths=(0.8,), n_items=64, n_prompts=32))


def search(planted, out, *, held_out=("c",), names="abc", items=None, **settings):
    texts = [one.messages[0].content for one in draw_prompts(planted.language, 8, seed=8)]
    organisms = dict.fromkeys(names, planted.tuned)
    given = (planted.base, organisms, planted.sae, planted.prompts, items or planted.items, texts, out)
    return find_persona(*given, held_out=held_out, **{"config": CONFIG, **settings})


@pytest.mark.filterwarnings("ignore:.*the SAE does not fit")
def test_it_ends_with_the_planted_causes(planted, tmp_path):
    told = []
    found = search(planted, tmp_path, on_progress=lambda done, total, stage: told.append((done, total, stage)))
    chosen = {one["latent"]: one["by"] for one in found["candidates"]}
    assert set(chosen) == {*planted.persona, *planted.correlates}
    assert list(chosen.values()) == ["delta", "attribution"] * 2
    assert next(iter(chosen)) == found["latents"][0]["latent"]
    assert next(latent for latent, by in chosen.items() if by == "attribution") in planted.persona
    assert {one["latent"] for one in found["latents"][:4]} == set(chosen)
    assert found["kinds"]["core"] >= 4
    for name, certification in found["certifications"].items():
        verdicts = {
            one["candidate"]["latents"][0]: one["verdict"]
            for one in certification["certificates"]
            if len(one["candidate"]["latents"]) == 1
        }
        assert all(verdicts[latent] == "both" for latent in planted.persona), name
        assert all(verdicts[latent] == "neither" for latent in planted.correlates), name
        assert certification["certificates"][-1]["candidate"]["name"] == "all 4"
    assert [name for name, one in found["organisms"].items() if one["held_out"]] == ["c"]
    assert {row["organism"] for row in found["held_out"]} == {"c"}
    assert set(found["representation"]) == {"a", "b"}
    pair = found["overlap"]["a"][0]
    assert (pair["first"], pair["second"]) == ("delta", "rate_delta")
    listed = found["latents"][0]["organisms"]
    assert set(listed["a"]) == {"diff", "rankings", "split"}
    assert set(listed["c"]) == {"diff"}
    assert listed["a"]["diff"]["latent"] == found["latents"][0]["latent"]
    assert json.loads((tmp_path / "persona.json").read_text(), parse_constant=pytest.fail) == json.loads(
        json.dumps(found)
    )
    (total,) = {total for _, total, _ in told}
    assert told[0] == (0, total, "behaviour")
    assert list(dict.fromkeys(done for done, _, _ in told)) == list(range(total))
    assert any(stage.startswith("certify a (") and stage.endswith(" measurements)") for _, _, stage in told)

    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    (tmp_path / "consensus" / "consensus.json").unlink()  # as if the run had been killed while it saved this
    assert search(planted, tmp_path) == found
    changed = {path.parent.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {"consensus"}
    with pytest.raises(InputError, match=r"out: .*that of a run with other held_out"):
        search(planted, tmp_path, held_out=())


@pytest.mark.filterwarnings("ignore:planted against planted")
def test_fine_tunes_that_share_nothing_end_without_candidates(planted, tmp_path):
    organisms = dict.fromkeys("ab", planted.base)
    given = (planted.base, organisms, planted.sae, planted.prompts[:12], planted.items[:8], ["w0a w1a w2a"], tmp_path)
    found = find_persona(*given, config=CONFIG)
    assert found["candidates"] == []
    assert found["certifications"] == {}
    assert found["overlap"] == {"a": [], "b": []}
    assert found["kinds"] == {"none": planted.sae.d_sae}
    assert len(found["latents"]) == CONFIG.n_listed


def test_what_does_not_go_together_is_an_error(planted, tmp_path):
    for settings, message in (
        ({"held_out": ("b", "c")}, "organisms: expected two or more to select latents on.*received a to select on"),
        ({"held_out": ("d",)}, "organisms: .*no d"),
        ({"config": PersonaConfig(positions=("prompt",))}, "role: expected one of prompt, received 'response'"),
        ({"items": planted.items[:6]}, "items: expected two or more .*received 3 that rank, 3 that are scored"),
        ({"checkpoints": {"a": tmp_path}}, "checkpoints: expected a folder with checkpoints"),
    ):
        with pytest.raises(InputError, match=message):
            search(planted, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
