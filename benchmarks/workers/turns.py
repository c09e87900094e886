"""A worker's side of `interleave`: do some items of work when asked, and tell how long they took.

Both sides speak JSON, one object a line. The harness sends settings, and the worker answers once it is ready; then
`{"n_items": n}` for every turn, answered with its times; and `{"n_items": 0}` at the end, answered with results. What
fails answers with `{"error": ...}`.
Between turns a worker sleeps in a read.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
_PROCESS = Path("/proc/self")


def serve(work: Callable[[Turns], None]) -> None:
    """Do a worker's work, which has to import its library itself, and tell the harness if it fails."""
    turns = Turns()
    try:
        work(turns)
    except Exception as error:
        first_sentence = str(error).split("\n")[0].split(". ")[0]
        turns.finish(error=f"{type(error).__name__}: {first_sentence}")


class Turns:
    """The line to the harness, and the stopwatch."""

    def __init__(self) -> None:
        self._memory_mib: dict[str, int] = {}
        # Libraries print; standard output belongs to the harness.
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.settings = self._hear()

    def timed(self, items: Iterator[Item], *, library: str) -> Iterator[Item]:
        """Hand items to whatever works on them, as many at a time as the harness asks for.

        An item's work lasts until the next one is asked for, so that a library's own loop can be timed from outside.
        One item comes after the last turn and is not timed, because some loops save something at their end.

        Args:
            items: as many as settings["n_items"].
            library: the distribution whose version is told.
        """
        import torch

        self._memory_mib["before"] = _forget_peak()
        self._say({"versions": {library: _version(library), "torch": torch.__version__}})
        while True:
            slept = time.process_time()
            n_items = self._hear()["n_items"]
            if not n_items:
                self._memory_mib["peak"] = _peak_mib()
                if torch.cuda.is_initialized():
                    self._memory_mib["gpu_peak"] = torch.cuda.max_memory_allocated() // 2**20
                break
            woke, start = time.process_time(), time.perf_counter()
            yield from islice(items, n_items)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            stop, done = time.perf_counter(), time.process_time()
            self._say(
                {
                    "seconds": (stop - start) / n_items,
                    "cpu_seconds": (done - woke) / n_items,
                    "idle_cpu_seconds": woke - slept,
                }
            )
        yield next(items)

    def finish(self, **results: Any) -> None:
        """Tell results, and memory before the first item and at its peak until the last; nothing comes after."""
        self._say({"memory_mib": self._memory_mib, **results})

    def _say(self, message: dict[str, Any]) -> None:
        print(json.dumps(message), file=self._out, flush=True)

    def _hear(self) -> dict[str, Any]:
        line = sys.stdin.readline()
        if not line:
            raise SystemExit("the harness has gone")
        return dict(json.loads(line))


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed: run from its source"


def _forget_peak() -> int:
    """Memory that the process has now, in MiB, after what it freed was given back; peaks count from here.

    Where the system is not Linux, they count from the start of the process.
    """
    if not _PROCESS.is_dir():
        return _peak_mib()
    ctypes.CDLL(None).malloc_trim(0)
    (_PROCESS / "clear_refs").write_text("5", encoding="ascii")
    return _peak_mib()


def _peak_mib() -> int:
    if not _PROCESS.is_dir():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    lines = (_PROCESS / "status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) // 1024
