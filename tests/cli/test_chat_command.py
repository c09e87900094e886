"""`saetools chat` as it is used: lines through a pipe, and keys at a terminal."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saetools import shipped_path
from saetools.cli import main

COMMAND = [sys.executable, "-m", "saetools", "chat", "--adapter", f"organism={shipped_path('adapters/organism')}"]
SHORT = ["--max-new-tokens", "8", "--temperature", "0"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "120"}


def test_lines_through_a_pipe(tmp_path: Path) -> None:
    lines = [
        "Say hi.",
        "/edit add 6400=0.4*norm on response",
        "/edits",
        "/retry",
        "/edit clmp 3=1",
        "/nonsense",
        "/drop 1",
        "/set temperature 0.5",
        f"/save {tmp_path / 'saved.md'}",
        "/quit",
        "never read",
    ]
    transcript = tmp_path / "chat.jsonl"
    command = [*COMMAND, *SHORT, "--transcript", str(transcript)]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, env=ENVIRONMENT, check=True)
    out = done.stdout
    assert out.startswith("base, organism, steered; /help for help\n")
    assert "base: Hello there! I'm here" in out
    assert "1  add 6400=0.4*norm on response" in out
    assert "edit: expected one of add, clamp" in out
    assert "command: expected one of /help, received '/nonsense'" in out
    assert "dropped add 6400=0.4*norm on response" in out
    assert "temperature=0.5" in out
    assert "2 turns in " in out
    rows = [json.loads(row) for row in transcript.read_text(encoding="utf-8").splitlines()]
    assert [row["edits"] for row in rows] == [[], ["add 6400=0.4*norm on response"]]
    assert rows[0]["answers"]["steered"] == rows[0]["answers"]["organism"] != rows[0]["answers"]["base"]
    assert rows[1]["answers"]["steered"] != rows[1]["answers"]["organism"] == rows[0]["answers"]["organism"]
    assert (tmp_path / "saved.md").read_text(encoding="utf-8").count("## Say hi.") == 2


def test_keys_at_a_terminal() -> None:
    """Panels side by side while answers come; Ctrl-C cuts an answer short, Ctrl-D leaves."""
    leader, follower = pty.openpty()
    command = [*COMMAND, "--max-new-tokens", "300", "--temperature", "0", "--edit", "clamp 6400=0"]
    with subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=ENVIRONMENT, start_new_session=True
    ) as process:
        os.close(follower)
        try:
            shown = _until(leader, "> ")
            assert "base, organism, steered" in shown
            os.write(leader, b"Tell me a long story.\n")
            drawn = _until(leader, "\u2500 steered \u2500")
            assert "\u2500 base \u2500" in drawn
            process.send_signal(2)
            _until(leader, "cut short\r\n> ")
            os.write(leader, b"\x04")
            assert process.wait(30) == 0
        finally:
            process.kill()
            os.close(leader)


def _until(leader: int, text: str) -> str:
    seen, end = "", time.monotonic() + 120
    while text not in seen:
        assert time.monotonic() < end, seen[-2000:]
        if select.select([leader], [], [], 1)[0]:
            seen += os.read(leader, 65536).decode("utf-8", "replace")
    return seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steer", "tuned"], "--steer: expected base, without a fine-tune"),
        (["--transcript", "/dev/null/x/y"], "--transcript: expected a place that can be written"),
        (["--edit", "clmp 3=1"], "edit: expected one of add, clamp"),
    ],
)
def test_options_are_checked(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["chat", *options])
    assert message in capsys.readouterr().err
