"""The shipped results say what the READMEs say, and what the search for a persona has to tell."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "data" / "results"


@pytest.fixture(scope="module")
def persona() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "persona-smollm2.json").read_text(encoding="utf-8"))
    return found


def test_readme_shows_the_tables_of_the_shipped_run(persona: dict[str, Any]) -> None:
    collect = runpy.run_path(str(RESULTS / "collect.py"))
    shown = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    tables = ("organisms_table", "latents_table", "certificates_table")
    lines = [line for name in tables for line in collect[name](persona)]
    assert [line for line in lines if line not in shown] == []


def test_shipped_run_selects_on_two_organisms_and_holds_one_out(persona: dict[str, Any]) -> None:
    held_out = [one["held_out"] for one in persona["organisms"].values()]
    assert sorted(held_out) == [False, False, True]
    assert set(persona["certifications"]) == set(persona["organisms"])
    core = [row["latent"] for row in persona["latents"] if row["kind"] == "core" and row["delta"] > 0]
    by_delta = [one["latent"] for one in persona["candidates"] if one["by"] == "delta"]
    assert core[: len(by_delta)] == by_delta
    assert {one["latent"] for one in persona["candidates"]} <= set(core)


def test_shipped_run_carries_the_planted_truth(persona: dict[str, Any]) -> None:
    collect = runpy.run_path(str(RESULTS / "collect.py"))
    planted = json.loads((RESULTS / "planted.json").read_text(encoding="utf-8"))
    assert persona["planted"] == collect["rounded"](planted)


def test_card_shows_the_planted_recall() -> None:
    planted = json.loads((RESULTS / "planted.json").read_text(encoding="utf-8"))
    card = (RESULTS / "README.md").read_text(encoding="utf-8")
    persona = [one for one in planted["recovery"]["detections"] if one["kind"] == "persona"]
    assert len(persona) == 4
    for one in persona:
        tops = " | ".join(f"{one['recall'][top]['mean']:.2f}" for top in ("8", "16", "32", "64"))
        assert f"| {one['strength']:g} | {tops} |" in card
