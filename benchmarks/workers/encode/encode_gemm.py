"""The bare encoder product of all tokens, some at a time: a yardstick."""

from __future__ import annotations

from workers.encode.task import Task
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    import torch

    d_model, d_sae = task.acts.shape[1], task.reference.shape[1]
    if task.precision == "int8":
        weight = torch.randint(-127, 127, (d_sae, d_model), dtype=torch.int8).T
        chunks = task.acts.clamp(-127, 127).to(torch.int8).split(task.batch)
        for _ in turns.timed(task.items(), library="torch"):
            for chunk in chunks:
                torch._int_mm(chunk, weight)
    else:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[task.precision]
        weight, chunks = torch.randn(d_model, d_sae).to(dtype), task.acts.to(dtype).split(task.batch)
        out = torch.empty(task.batch, d_sae, dtype=dtype)
        for _ in turns.timed(task.items(), library="torch"):
            for chunk in chunks:
                torch.mm(chunk, weight, out=out)
    turns.finish()


if __name__ == "__main__":
    serve(work)
