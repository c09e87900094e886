"""Contestants in turn: each lives in a process of its own, only one works at a time, and every round has another order.

What slows the machine down for a while then slows all of them down, and ratios within a round hardly change.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import N_CORES, busy_seconds

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Contestant:
    """What runs, by which interpreter, and what it is told."""

    name: str
    library: str
    """What it stands for in a comparison."""
    module: str
    """Of the package `workers`."""
    python: Path
    settings: Mapping[str, Any]
    tokens_per_item: int


@dataclass
class Record:
    """What was measured of a contestant."""

    contestant: Contestant
    facts: dict[str, Any] = field(default_factory=dict)
    """What the worker said of itself, at the start and at the end."""
    seconds: list[float] = field(default_factory=list)
    """Per item, one figure a round."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Of all its threads, likewise."""
    others_cpu_share: list[float] = field(default_factory=list)
    """What everything else on the machine used of its cores meanwhile: 0 on a quiet one."""
    idle_cpu_seconds: float = 0.0
    """What the process used up between its turns, in all."""
    error: str | None = None

    def tokens_per_second(self) -> int:
        """At the median."""
        return round(self.contestant.tokens_per_item / statistics.median(self.seconds))

    def as_json(self) -> dict[str, Any]:
        """Medians, quartiles and all raw figures."""
        if self.error is not None:
            return {"name": self.contestant.name, "error": self.error}
        return {
            "name": self.contestant.name,
            "seconds": summary(self.seconds),
            "tokens_per_second": self.tokens_per_second(),
            "cpu_seconds": summary(self.cpu_seconds),
            "others_cpu_share": summary(self.others_cpu_share),
            "idle_cpu_seconds": round(self.idle_cpu_seconds, 3),
            **self.facts,
        }


def summary(figures: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and the figures themselves."""
    lower, median, upper = statistics.quantiles(figures, n=4, method="inclusive")
    return {
        "median": round(median, 4),
        "quartiles": [round(lower, 4), round(upper, 4)],
        "runs": [round(figure, 4) for figure in figures],
    }


def interleave(
    contestants: Sequence[Contestant], *, rounds: int, items_per_turn: int, threads: int, seed: int = 0
) -> list[Record]:
    """Time all contestants; one that fails is recorded with its error and left out from then on.

    A first turn of each, in which it allocates memory, does not count.
    """
    records = [Record(contestant) for contestant in contestants]
    generator = random.Random(seed)
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(record, threads)) for record in records]
        for worker in workers:
            worker.send_settings(items_per_turn * (rounds + 1) + 1)
        for worker in workers:
            print(f"starting {worker.record.contestant.name}", file=sys.stderr)
            worker.await_ready()
        for worker in workers:
            worker.turn(items_per_turn, counts=False)
        for number in range(1, rounds + 1):
            print(f"round {number} of {rounds}", file=sys.stderr)
            for worker in generator.sample(workers, len(workers)):
                worker.turn(items_per_turn)
        for worker in workers:
            worker.finish()
    return records


class _Worker:
    """A contestant's process; what it answers goes into the record."""

    def __init__(self, record: Record, threads: int) -> None:
        contestant = record.contestant
        self.record = record
        self.process = subprocess.Popen(
            [contestant.python, "-m", f"workers.{contestant.module}"],
            cwd=HERE,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def send_settings(self, n_items: int) -> None:
        """Have it load its library and get ready for so many items, one of them after the last turn."""
        self._send({**self.record.contestant.settings, "n_items": n_items})

    def await_ready(self) -> None:
        """Wait until it is."""
        self.record.facts.update(self._hear())

    def turn(self, n_items: int, *, counts: bool = True) -> None:
        """Let it work."""
        busy = busy_seconds()
        answer = self._ask({"n_items": n_items})
        if answer and counts:
            others = busy_seconds() - busy - answer["cpu_seconds"] * n_items
            self.record.seconds.append(answer["seconds"])
            self.record.cpu_seconds.append(answer["cpu_seconds"])
            self.record.others_cpu_share.append(max(0.0, others / (answer["seconds"] * n_items * N_CORES)))
            self.record.idle_cpu_seconds += answer["idle_cpu_seconds"]

    def finish(self) -> None:
        """Let it end and say what came of it."""
        self.record.facts.update(self._ask({"n_items": 0}))

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The answer, which is empty if the worker has failed, now or before."""
        self._send(message)
        return self._hear()

    def _send(self, message: Mapping[str, Any]) -> None:
        with suppress(BrokenPipeError):
            print(json.dumps(message), file=self.process.stdin, flush=True)

    def _hear(self) -> dict[str, Any]:
        if self.record.error is not None:
            return {}
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"ended with exit code {self.process.wait()}"}
        self.record.error = answer.get("error")
        if self.record.error is not None:
            print(f"{self.record.contestant.name}: {self.record.error}", file=sys.stderr)
            return {}
        return answer
