"""The command line on the real model: each command as a user types it, on small data."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from saetools.cli import main
from saetools.sae import load_sae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of chat and a text; the commands of this module add their outputs."""
    path = tmp_path_factory.mktemp("cli")
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} plus {i}?"},
                {"role": "assistant", "content": f"It is {2 * i}."},
            ]
        }
        for i in range(12)
    ]
    (path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats), encoding="utf-8")
    (path / "prompts.jsonl").write_text('{"prompt": "Name a colour."}\n{"prompt": "Name a fruit."}\n', encoding="utf-8")
    (path / "text.txt").write_text("The tide went out and the boats lay on the sand. " * 60, encoding="utf-8")
    return path


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Path, str]:
    """An SAE made by `harvest` and `train`, and what they printed."""
    data = [str(folder / "chats.jsonl"), str(folder / "text.txt")]
    store, out = str(folder / "store"), folder / "sae"
    settings = ["--d-sae", "128", "--k", "4", "--batch-size", "128", "--n-tokens", "2560", "--warmup-steps", "2"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["harvest", "--data", *data, "--sites", "blocks.3.hook_resid_post", "--out", store, "--max-tokens", "64"])
        main(["train", "--store", store, "--out", str(out), *settings])
    return out, printed.getvalue()


def test_harvest_then_train(folder: Path, trained: tuple[Path, str]) -> None:
    out, printed = trained
    assert "tokens of" in printed
    assert str(folder / "store") in printed
    assert str(out) in printed
    sae = load_sae(out)
    assert sae.d_sae == 128
    assert sae.metadata.site == "blocks.3.hook_resid_post"
    assert sae.p99 is not None
    assert sae.metadata.median_norm


def test_finetune_then_diff(folder: Path, trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    adapter, chats = str(folder / "adapter"), str(folder / "chats.jsonl")
    settings = ["--epochs", "1", "--batch-size", "6", "--rank", "2", "--lr", "1e-3"]
    main(["finetune", "--data", chats, "--out", adapter, *settings])
    out = folder / "diff"
    models = ["--adapter", adapter, "--sae", str(trained[0])]
    main(["diff", *models, "--data", chats, "--positions", "response", "--out", str(out), "--n-top", "3"])
    assert "128 latents" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"latents.parquet", "diff.json", "diff.html"}


def test_steer_and_generate(folder: Path, trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    sae, short = ["--sae", str(trained[0])], ["--max-new-tokens", "6", "--temperature", "0"]
    main(["steer", "--prompts", "Say hello.", *sae, "--clamp", "3=40", "--scale", "5=2", *short])
    shown = capsys.readouterr().out
    assert "clamp latent 3 to [40.0]" in shown
    out = folder / "answers.jsonl"
    main(["generate", "--data", str(folder / "prompts.jsonl"), "--out", str(out), *short])
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["question"] for row in rows] == ["Name a colour.", "Name a fruit."]
    assert all(row["variant"] == "plain" and row["text"] for row in rows)


def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = str(folder / "chats.jsonl"), str(folder / "unused")
    assert "layer below 30" in fails(
        capsys, "harvest", "--data", data, "--sites", "blocks.99.hook_resid_post", "--out", str(folder / "far")
    )
    assert "site: expected" in fails(capsys, "harvest", "--data", data, "--sites", "nonsense", "--out", out)
    assert "check the path" in fails(capsys, "generate", "--data", "missing.jsonl", "--out", out)
    assert "source: expected" in fails(capsys, "generate", "--data", data, "--model", "no such model", "--out", out)
    assert "--clamp" in fails(capsys, "steer", "--prompts", "Hi", "--clamp", "x=1")
    assert "latents: expected" in fails(capsys, "steer", "--prompts", "Hi", "--sae", str(trained[0]), "--ablate", "999")
    assert "adapter" in fails(capsys, "diff", "--data", data, "--out", out)
    assert "report.json" in fails(capsys, "report", out)
    (folder / "bad.jsonl").write_text('{"prompt": "ok"}\n{oops\n', encoding="utf-8")
    assert "bad.jsonl:2" in fails(capsys, "generate", "--data", str(folder / "bad.jsonl"), "--out", out)
    assert not Path(out).exists()


def test_the_installed_command_answers() -> None:
    command = Path(sys.executable).with_name("saetools")
    shown = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    for name in ("fetch", "harvest", "train", "diff", "steer", "generate", "finetune", "report", "demo"):
        assert name in shown
    done = subprocess.run([command, "generate", "--no-such-option"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
