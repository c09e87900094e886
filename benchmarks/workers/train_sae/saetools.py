"""saetools: `train_sae` itself, on a source that is the stopwatch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

from torch import Tensor

from workers.train_sae.task import Task
from workers.turns import Turns, serve


class Source:
    """Activations as `train_sae` wants them, in one epoch."""

    def __init__(self, task: Task, turns: Turns) -> None:
        self.task, self.turns = task, turns

    def n_batches(self, batch_size: int) -> int:
        return self.task.n_steps

    def epoch_batches(self, batch_size: int, *, seed: int, epoch: int = 0, start: int = 0) -> Iterator[Tensor]:
        return self.turns.timed(self.task.batches(), library="saetools")

    def sample(self, n_tokens: int, *, seed: int) -> Tensor:
        return self.task.train[:n_tokens]


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    from saetools.sae import TopKLoss, TrainConfig, train_sae

    config = TrainConfig(
        d_sae=task.d_sae,
        loss=TopKLoss(k=task.k),
        n_tokens=task.n_steps * task.batch,
        batch_size=task.batch,
        lr=task.lr,
        warmup_steps=0,
        decay_fraction=0.0,
        seed=task.seed,
        encode_dtype={"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}[task.precision],
    )
    log = []
    with tempfile.TemporaryDirectory() as out:
        sae = train_sae(Source(task, turns), config, out, on_progress=log.append, device=task.device)
    turns.finish(fvu=task.fvu(sae.to(task.device)), n_dead=round(log[-1].dead * task.d_sae))


if __name__ == "__main__":
    serve(work)
