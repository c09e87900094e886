"""The bare encoder product, which no step can do without: a yardstick."""

from __future__ import annotations

from workers.train_sae.task import Task
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    import torch

    dtype = torch.bfloat16 if task.bf16 else torch.float32
    weight = torch.randn(task.d_model, task.d_sae, device=task.device).to(dtype)
    out = torch.empty(task.batch, task.d_sae, dtype=dtype, device=task.device)
    batches = [x.to(dtype) for x in task.train.split(task.batch)]
    for number, _ in enumerate(turns.timed(task.batches(), library="torch")):
        torch.mm(batches[number % len(batches)], weight, out=out)
    turns.finish()


if __name__ == "__main__":
    serve(work)
