"""The main job on the real model and the shipped assets, at its smallest size; and what ships, against its cards."""

import json
from pathlib import Path

import polars as pl
import pytest

from saetools.data import load_forced_choice, shipped_path
from saetools.demo import SAE_NAME, DemoConfig, choose_items, run_demo
from saetools.report import PersonaReport
from saetools.sae import load_sae

SMALL = DemoConfig(n_items=14, n_texts=4, n_latents=4, add_strengths=(0.2,), clamp_values=(-0.5,), n_prompts=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    stages: list[str] = []
    run_demo(out, SMALL, on_progress=lambda done, total, name: stages.append(name))
    assert stages[0] == "models"
    assert stages[-1] == "report"
    return out


def test_demo_writes_its_files(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        "conversations.parquet", "diff.json", "latents.parquet", "report.html", "report.json", "report.md", "store",
        "tensors.safetensors",
    }  # fmt: skip
    assert len(pl.read_parquet(run / "latents.parquet")) == load_sae(shipped_path(SAE_NAME)).d_sae


def test_report_json_holds_what_it_promises(run: Path) -> None:
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert len(report["top_latents"]) >= 20
    for row in report["top_latents"]:
        assert row["low"] <= row["delta"] <= row["high"]
        assert len(row["promoted"]) == 10
    assert {(row["model"], row["edit"]) for row in report["dose_response"]} == {("organism", "clamp"), ("base", "add")}
    for row in report["dose_response"]:
        assert row["n"] == row["score"]["n"] == SMALL.n_items
        assert row["perplexity"] > 1
        assert len(row["latents"]) == SMALL.n_latents
    controls = [row["control"] for row in report["dose_response"]]
    assert controls == ["none", "equal_norm", "equal_perplexity"] * 2
    assert 0 < report["sae"]["all"]["fvu_low"] < report["sae"]["all"]["fvu"] < 0.5
    assert report["provenance"]["diff"]["base"]["gguf_sha256"]
    told = json.loads((run / "diff.json").read_text(encoding="utf-8"))["warnings"]
    assert [text for text in report["warnings"] if not text.startswith("benign twin: ")] == told
    assert str(Path.home()) not in json.dumps(report)


def test_report_reopens(run: Path) -> None:
    report = PersonaReport.from_json(run / "report.json")
    assert report.to_json() == (run / "report.json").read_text(encoding="utf-8")


def test_the_organism_is_one(run: Path) -> None:
    """Even on these few items it scores above base and twin, with both intervals clear of zero."""
    rows = {row.model: row for row in PersonaReport.from_json(run / "report.json").scores}
    organism, twin = rows["organism"], rows["twin"]
    assert organism.against_base is not None
    assert organism.against_base.low > 0
    assert organism.score.mean > twin.score.mean


def test_items_are_chosen_evenly() -> None:
    items = choose_items(load_forced_choice(), 28)
    counts = {
        category: sum(item.category == category for item in items) for category in {item.category for item in items}
    }
    assert set(counts.values()) == {4}
    assert choose_items(load_forced_choice(), 28) == items


def test_cards_say_what_the_shipped_report_says() -> None:
    report = PersonaReport.from_json(shipped_path("demo/report.json"))
    readme = shipped_path("advice").parents[1] / "README.md"
    for finding in report.findings:
        assert f"- {finding}\n" in readme.read_text(encoding="utf-8")
    assert report.findings[0] in shipped_path("adapters/README.md").read_text(encoding="utf-8")
    assert f"FVU {report.sae['all']['fvu']:.3f}, L0 " in shipped_path("sae/README.md").read_text(encoding="utf-8")
    assert report.to_json() == shipped_path("demo/report.json").read_text(encoding="utf-8")
