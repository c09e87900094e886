"""Hugging Face's `generate`, alone or with a bare hook."""

from __future__ import annotations

import torch

from workers.steer.task import Hook, Task
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    model = task.model()
    if task.edit != "plain":
        model.model.layers[task.layer].register_forward_hook(Hook(task))
    with torch.inference_mode():
        for _ in turns.timed(task.items(), library="transformers"):
            out = model.generate(task.token_ids, **task.options())
    turns.finish(**task.quality(out))


if __name__ == "__main__":
    serve(work)
