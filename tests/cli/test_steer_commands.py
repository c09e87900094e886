"""Commands that answer under edits: a file of prompts that goes on after a stop, and sweeps."""

import json
from pathlib import Path
from typing import Any

import pytest

from saetools import generation
from saetools.cli import main
from saetools.evaluate import Sweep

SHORT = ["--max-new-tokens", "6", "--temperature", "0"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    questions = ["Name a colour.", "Name a fruit.", "Say hi."]
    path.write_text("".join(json.dumps({"prompt": text, "id": text[-4:]}) + "\n" for text in questions))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_generate_goes_on_where_it_was_stopped(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit = ["--edit", "add 6400=0.2*norm on response"]
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    command = ["generate", "--data", str(prompts), *edit, *SHORT, "--batch-rows", "1"]
    main([*command, "--out", str(whole)])
    real, made = generation.generate_batches, []

    def once(*args: Any, **kwargs: Any) -> Any:
        for some in real(*args, **kwargs):
            made.append(len(some))
            yield some
            if len(made) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(generation, "generate_batches", once)
    with pytest.raises(SystemExit, match="130"):
        main([*command, "--out", str(stopped)])
    assert not stopped.exists()
    assert (tmp_path / "stopped.jsonl.part").exists()
    main([*command, "--out", str(stopped)])
    assert made == [1, 1, 1]
    assert rows_of(stopped) == rows_of(whole)
    assert [row["id"] for row in rows_of(whole)] == ["our.", "uit.", " hi."]
    assert {row["variant"] for row in rows_of(whole)} == {"edited"}
    assert not (tmp_path / "stopped.jsonl.part").exists()
    (tmp_path / "other.jsonl.part").write_text(json.dumps({"identity": {}}) + "\n{}\n")
    with pytest.raises(SystemExit):  # another edit's answers are not taken for these
        main([*command, "--out", str(tmp_path / "other.jsonl")])
    assert "expected a new folder, or the measurements of this run in other.jsonl.part" in capsys.readouterr().err


def test_sweep_tells_how_far_one_can_go(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    edits = ["add 6400={}*norm", "clamp 4162={}*p99 on response"]
    command = [
        "sweep",
        "--data",
        str(prompts),
        "--edit",
        *edits,
        "--strengths",
        "0.05",
        "40",
        "--out",
        str(out),
        *SHORT,
    ]
    main(command)
    shown = capsys.readouterr().out
    assert "add 6400={}*norm: coherent up to 0.05" in shown
    assert {file.name for file in out.iterdir()} == {
        "answers.jsonl",
        "answers.parquet",
        "sweep.json",
        "edit-1.html",
        "edit-2.html",
    }
    sweep = Sweep.load(out)
    assert sweep.edits[edits[1]][40.0].endswith("clamp 4162=40*p99 on response")
    main([*command, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["max_coherent_strength"][edits[0]] == 0.05
    assert len(found["doses"]) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--edit", "add 3=1", "--strengths", "1"], "--edit: expected {} in the place of the strength"),
        (["--edit", "add 3={}", "--strengths", "1", "-1"], "strengths: expected all above 0, or all below"),
        (["--edit", "add 3={}", "--strengths", "1", "--prompts", "a", "--data", "b"], "--data: expected either"),
        (["--edit", "--strengths", "1"], "the number of --edit: expected 1 or more"),
    ],
)
def test_options_are_checked(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "--out", str(tmp_path / "out"), *options])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
