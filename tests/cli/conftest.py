"""Commands that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from saetools.cli import main


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`fails(*args)`: the one line that a command on bad input prints."""

    def run(*args: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("saetools: ")
        return lines[0]

    return run


@pytest.fixture
def fails_early(fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`fails_early(*args)`: the same, before a model is loaded or anything written; OUT stands for a new folder."""

    def run(*args: str) -> str:
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", pytest.fail)
        line = fails(*(str(tmp_path / "made" / "out") if arg == "OUT" else arg for arg in args))
        assert not list(tmp_path.iterdir())
        return line

    return run
