"""Where the time of our own training step goes, stage by stage.

    python benchmarks/profile_train_sae.py --json profile.json

Runs `train_sae` with a stopwatch around the functions that a step consists of; a stage's time is its own, without that
of the stages inside it.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

import numpy as np
import results
import torch
from activations import harvested
from interleave import summary
from machine import describe_machine
from torch import Tensor

from saetools.sae import loss, sparse, train, trainer

BATCH, WARM_UP_STEPS, STEPS = 4096, 3, 30
STAGES = [
    ("encoder product", loss, "select_top"),
    ("encoder product", sparse, "_propose"),
    ("top k", sparse, "_top_columns"),
    ("sorting pairs by latent", sparse.LatentMajorPairs, "__init__"),
    ("dot product of each pair", sparse.LatentMajorPairs, "dots"),
    ("decoding", loss, "combine"),
    ("weight gradients", sparse.LatentMajorPairs, "sum_tokens"),
    ("Adam", torch.optim.Adam, "step"),
    ("clipping", trainer, "_update"),
    ("figures for the log", trainer._Window, "add"),
]
REST = "the rest"


class Stopwatch:
    """The own time of every stage, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._open = [REST]
        self._begin_step()

    def around(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._charge()
            self._open.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._open.pop()

        return timed

    def each(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """Hand out batches; what happens until the next one is asked for is a step."""
        for batch in batches:
            self._begin_step()
            yield batch
            self._charge()
            self.steps.append(dict(self._seconds))

    def _begin_step(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def _charge(self) -> None:
        now = time.perf_counter()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now


class Source:
    """Activations as `train_sae` wants them, four batches over and over."""

    def __init__(self, acts: Tensor, n_batches: int, stopwatch: Stopwatch) -> None:
        self.acts, self._n_batches, self.stopwatch = acts, n_batches, stopwatch

    def n_batches(self, batch_size: int) -> int:
        return self._n_batches

    def epoch_batches(self, batch_size: int, *, seed: int, epoch: int = 0, start: int = 0) -> Iterator[Tensor]:
        return self.stopwatch.each(islice(cycle(self.acts.split(batch_size)), self.n_batches(batch_size)))

    def sample(self, n_tokens: int, *, seed: int) -> Tensor:
        return self.acts[:n_tokens]


def main() -> None:
    arguments = results.parse(results.parser("profile_train_sae.py", __doc__.splitlines()[0]))
    torch.set_num_threads(arguments.threads)
    machine = describe_machine()
    acts = torch.from_numpy(np.load(harvested(5 * BATCH), mmap_mode="c"))[: 4 * BATCH]
    batch, d_sae, n_steps = (512, 1024, 5) if arguments.quick else (BATCH, 8192, STEPS)
    stages = {encoder: _profile(acts, encoder, batch, d_sae, n_steps) for encoder in ("int8", "bfloat16", "float32")}
    steps = {encoder: figures["step"] for encoder, figures in stages.items()}
    result = {
        "command": results.command("profile_train_sae.py", arguments),
        "quick": arguments.quick,
        "shape": {"d_model": acts.shape[1], "d_sae": d_sae, "k": 32, "batch": batch},
        "method": {
            "threads": arguments.threads,
            "steps": n_steps,
            "warm_up_steps": WARM_UP_STEPS,
            "seconds": "of one step",
        },
        "machine": machine,
        "ratios": {  # of our steps, to the fastest of them
            encoder: round(step["median"] / min(one["median"] for one in steps.values()), 4)
            for encoder, step in steps.items()
        },
        "runs": {encoder: step["runs"] for encoder, step in steps.items()},
        "stages": stages,
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _print_table(result)


def _profile(acts: Tensor, encode_dtype: str, batch: int, d_sae: int, n_steps: int) -> dict[str, Any]:
    stopwatch = Stopwatch()
    plain = [(owner, name, getattr(owner, name)) for _, owner, name in STAGES]
    n_batches = WARM_UP_STEPS + n_steps + 1
    config = train.TrainConfig(d_sae=d_sae, n_tokens=n_batches * batch, batch_size=batch, encode_dtype=encode_dtype)
    try:
        for stage, owner, name in STAGES:
            setattr(owner, name, stopwatch.around(stage, getattr(owner, name)))
        with tempfile.TemporaryDirectory() as out:
            train.train_sae(Source(acts, n_batches, stopwatch), config, out)
    finally:
        for owner, name, function in plain:
            setattr(owner, name, function)
    steps = stopwatch.steps[WARM_UP_STEPS:]
    stages = {stage: summary([step.get(stage, 0.0) for step in steps]) for stage in [*(row[0] for row in STAGES), REST]}
    return {**stages, "step": summary([sum(step.values()) for step in steps])}


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("ms of a step (median)", *result["stages"], box=None)
    for stage in result["stages"]["float32"]:
        table.add_row(stage, *(f"{1000 * stages[stage]['median']:.0f}" for stages in result["stages"].values()))
    Console().print(table)


if __name__ == "__main__":
    main()
