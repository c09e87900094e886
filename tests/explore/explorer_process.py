"""A server process of the explorer, and what a page of it complains of."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from saetools.data import shipped_path

ADAPTER = f"organism={shipped_path('adapters/organism')}"


def start(folder: Path, *options: str, token: str | None = None) -> tuple[subprocess.Popen[str], str]:
    """A server process, and where it is."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if token is None else {"SAETOOLS_TOKEN": token})
    command = [sys.executable, "-m", "saetools", "explore", str(folder), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    told = ""
    for line in process.stdout:
        told += line
        if found := re.search(r"at (http://\S+)", line):
            return process, found[1]
    stop(process)
    raise AssertionError(told)


def stop(process: subprocess.Popen[str]) -> None:
    """End a server."""
    process.terminate()
    process.communicate(timeout=30)


class Seen:
    """What a page complains of."""

    def __init__(self, page: Any) -> None:
        self.errors: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: self.errors.append("a dialog") or dialog.dismiss())
