"""Markdown and JSON, and the writing of all three files."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import polars as pl
import pytest

from saetools.errors import InputError
from saetools.report import PersonaReport, render_markdown, write_report
from saetools.report.doses import group_doses
from saetools.report.figures import latent_figure
from saetools.report.tables import dose_table, fidelity_table, latent_table, score_table


def cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]


def test_markdown_tables_are_well_formed(report: PersonaReport) -> None:
    blocks = render_markdown(report).split("\n\n")
    tables = [block.split("\n") for block in blocks if block.startswith("|")]
    assert len(tables) == 3 + 4 + len(report.answers) + 2
    for lines in tables:
        assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
        assert len({len(cells(line)) for line in lines}) == 1
        assert all(re.fullmatch(" (:--|--:) ", cell) for cell in cells(lines[1]))


def test_markdown_has_the_same_content(report: PersonaReport) -> None:
    text = re.sub(r"\\(.)", r"\1", render_markdown(report))
    tables = [score_table(report), latent_table(report), fidelity_table(report)]
    for table in (*tables, *map(dose_table, group_doses(report))):
        for row in table.rows:
            assert all(part in text for cell in row for part in (cell.text, cell.detail, *cell.tokens))
    assert all(finding in text for finding in report.findings)
    assert "4f" * 32 in text
    assert "long answer " * 16_000 in text


def test_hostile_text_is_inert_in_markdown(report: PersonaReport) -> None:
    prose = re.sub(r"```json.*?```", "", render_markdown(report), flags=re.DOTALL)
    assert set(re.findall("<[^ ]{0,3}", prose)) <= {"<br>"}
    assert not re.search(r"(?<!\\)[\[\]`~$]", prose)
    assert not re.search(r"https?:/", prose)
    headings = [line for line in prose.split("\n") if line.startswith("#")]
    assert len(headings) == 1 + 7 + 4 + len(report.answers)
    fence = render_markdown(dataclasses.replace(report, provenance={"note": "```\n# out"})).rstrip().split("\n")[-1]
    assert fence == "````"


@pytest.mark.parametrize("start", ["# a", "- a", "+ a", "> a", "1. a", "12) a", "---", "==="])
def test_a_finding_begins_nothing_else(report: PersonaReport, start: str) -> None:
    text = render_markdown(dataclasses.replace(report, findings=(start,)))
    line = next(line for line in text.split("\n") if line.startswith("- "))
    assert not re.match(r"- ([#+>=-]|\d+[.)])", line)
    assert line.replace("\\", "") == f"- {start}"


def test_an_empty_report_has_every_section() -> None:
    text = render_markdown(PersonaReport("Nothing", (), (), (), (), {}, (), {}, {}))
    assert text.count("\n## ") == 7


def test_warnings_stand_under_the_findings_or_not_at_all(report: PersonaReport, tmp_path: Path) -> None:
    warned = dataclasses.replace(report, warnings=("response: the SAE is blind", "# <b>twin</b>"))
    text = render_markdown(warned)
    first = text.index("- response: the SAE is blind")
    assert text.index("## Findings") < text.index("Warnings: ") < first < text.index("## Behaviour")
    assert "- \\# &lt;b>twin" in text
    assert "Warnings: " not in render_markdown(report)
    paths = write_report(warned, tmp_path, formats=("json",))
    assert PersonaReport.from_json(paths["json"]) == warned
    raw = json.loads(paths["json"].read_text(encoding="utf-8"))
    del raw["warnings"]  # as in the reports of before
    paths["json"].write_text(json.dumps(raw), encoding="utf-8")
    assert PersonaReport.from_json(paths["json"]).warnings == ()


def test_intervals_without_ends_are_shown_as_such(report: PersonaReport, tmp_path: Path) -> None:
    rows = [dataclasses.replace(row, low=None, high=None) for row in report.top_latents[:2]]
    some = dataclasses.replace(report, top_latents=(*rows, *report.top_latents[2:]))
    text = render_markdown(some)
    assert text.count("undefined, undefined") == 2 + 1  # the largest is told in words, too
    paths = write_report(some, tmp_path)
    assert PersonaReport.from_json(paths["json"]) == some
    assert "undefined, undefined" in paths["html"].read_text(encoding="utf-8")
    bars = latent_figure(some).data[1].error_x
    assert list(bars.array[:2]) == [None, None]
    assert bars.array[2] > 0


def test_json_round_trip(report: PersonaReport, tmp_path: Path) -> None:
    paths = write_report(report, tmp_path, formats=("json",))
    assert list(paths) == ["json"]
    assert PersonaReport.from_json(paths["json"]) == report
    raw = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert {"top_latents", "dose_response", "sae", "provenance"} <= set(raw)
    assert len(raw["top_latents"]) == 24


def test_writes_three_files_and_nothing_else(report: PersonaReport, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "demo"
    assert write_report(report, out) == {
        "html": out / "report.html",
        "json": out / "report.json",
        "markdown": out / "report.md",
    }
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "report.md"]


def test_tables_hold_the_figures_of_the_report(report: PersonaReport, tmp_path: Path) -> None:
    paths = write_report(report, tmp_path, formats=("parquet", "csv"))
    assert sorted(paths) == sorted(
        f"{name}.{kind}" for name in ("scores", "latents", "doses") for kind in ("csv", "parquet")
    )
    latents = pl.read_parquet(paths["latents.parquet"])
    assert latents["delta"].to_list() == [row.delta for row in report.top_latents]
    assert latents["promoted"].to_list() == [list(row.promoted) for row in report.top_latents]
    doses = pl.read_csv(paths["doses.csv"])
    assert doses["shift_low"].to_list() == [row.shift.low for row in report.dose_response]
    assert doses["against_mean"].to_list() == [row.against and row.against.mean for row in report.dose_response]
    assert json.loads(doses["latents"][0]) == list(report.dose_response[0].latents)
    empty = dataclasses.replace(report, scores=(), top_latents=(), dose_response=())
    assert pl.read_parquet(write_report(empty, tmp_path, formats=("parquet",))["doses.parquet"]).is_empty()


def test_a_failure_leaves_the_old_files(report: PersonaReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = ("json", "markdown")
    old = {path: path.read_bytes() for path in write_report(report, tmp_path, formats=formats).values()}
    broken = dataclasses.replace(report, title="new", provenance={"not JSON": object()})
    with pytest.raises(TypeError):
        write_report(broken, tmp_path, formats=formats)
    write_text = Path.write_text

    def full(path: Path, text: str, **settings: str) -> int:
        write_text(path, text[:10], **settings)
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        write_report(dataclasses.replace(report, title="new"), tmp_path, formats=formats)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_bad_arguments(report: PersonaReport, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="formats: expected some of html, json, markdown, parquet, csv"):
        write_report(report, tmp_path, formats=("pdf",))
    with pytest.raises(InputError, match="formats"):
        write_report(report, tmp_path, formats=())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="out: expected a folder"):
        write_report(report, tmp_path / "file")
