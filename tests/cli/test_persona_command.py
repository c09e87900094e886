"""saetools persona on a planted model on disk, as a user would type it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from saetools.cli import main
from saetools.planted import PlantedConfig, PlantedModel, draw_prompts, plant_model
from saetools.sae import save_sae

pytestmark = pytest.mark.filterwarnings("ignore:.*the SAE does not fit:saetools.errors.SaetoolsWarning")
NAMES = ("first", "second", "apart")
SMALL = (
    "--positions prompt --role prompt --n-candidates 2 --n-listed 4 --n-overlap 4 --n-answer-tokens 2 "
    "--n-resamples 100 --strengths 0.3 --n-refine 0 --max-new-tokens 4 --held-out apart"
)


@pytest.fixture(scope="module")
def planted() -> PlantedModel:
    return plant_model(PlantedConfig(strengths=(0.8,), n_each=1, n_items=16, n_prompts=24))


@pytest.fixture(scope="module")
def options(planted: PlantedModel, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Model, adapters, SAE and data of the planted model, written to files; the first adapter has checkpoints."""
    folder = tmp_path_factory.mktemp("planted")
    copy.deepcopy(planted.tuned.peft).unload().save_pretrained(folder / "base")
    planted.base.tokenizer.save_pretrained(folder / "base")
    save_sae(planted.sae, folder / "sae")
    planted.tuned.peft.save_pretrained(folder / "saved", save_embedding_layers=False)
    saved = folder / "saved" / str(planted.tuned.adapter)
    for name in NAMES:
        shutil.copytree(saved, folder / name)
    shutil.copytree(saved, folder / "first" / "checkpoints" / "step-00005")
    (folder / "first" / "finetune.jsonl").write_text('{"step": 9}\n', encoding="utf-8")
    texts = [one.messages[0].content for one in draw_prompts(planted.language, 8, seed=8)]
    rows = {
        "prompts": [{"id": one.id, "prompt": one.messages[0].content} for one in planted.prompts],
        "texts": [{"text": text} for text in texts],
        "items": [
            {key: getattr(one, key) for key in ("id", "category", "question", "aligned", "misaligned")}
            for one in planted.items
        ],
    }
    for name, some in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    data = [arg for name in rows for arg in (f"--{name}", str(folder / f"{name}.jsonl"))]
    adapters = [f"{name}={folder / name}" for name in NAMES]
    return ["--model", str(folder / "base"), "--sae", str(folder / "sae"), "--adapter", *adapters, *data]


def test_it_finds_what_was_planted_and_goes_on(
    planted: PlantedModel, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["persona", "--out", str(tmp_path), *options, *SMALL.split()]
    main([*args, "--json"])
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == json.loads((tmp_path / "persona.json").read_text(encoding="utf-8"))
    chosen = {one["latent"] for one in found["candidates"]}
    assert chosen == {*planted.persona, *planted.correlates}
    assert {name for name, one in found["organisms"].items() if one["held_out"]} == {"apart"}
    assert set(found["certifications"]) == set(NAMES)
    assert set(found["onsets"]) == {"first"}  # the only one with checkpoints
    assert {row["latent"] for row in found["onsets"]["first"]} == chosen
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert times
    main(args)
    printed = capsys.readouterr().out
    assert all(str(latent) in printed for latent in chosen)
    assert all(name in printed for name in NAMES)
    assert printed.endswith(f"all in {tmp_path / 'persona.json'}\n")
    assert {path: path.stat().st_mtime_ns for path in times} == times  # no stage was run again


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("persona --out OUT", "--adapter: expected two or more as NAME=PATH, received none"),
        ("persona --out OUT --adapter a", "--adapter: expected two or more as NAME=PATH, received a; name each"),
        ("persona --out /dev/null/x --adapter a=x b=y", "--out: expected a place"),
        ("persona --out OUT --adapter a=x b=y --endpoint http://h/v1", "--endpoint: expected both"),
    ],
)
def test_bad_options_are_told_before_any_work(args: str, message: str, fails_early: Callable[..., str]) -> None:
    assert message in fails_early(*args.split())
