"""saetools: Hugging Face's `generate` on a steered model."""

from __future__ import annotations

import torch

from workers.steer.ours import edits
from workers.steer.task import Task, in_memory
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    from saetools import load_model, steered_model

    lm = load_model(task.settings["model"])
    in_memory(lm.model)
    model = steered_model(lm, edits(task))
    with torch.inference_mode():
        for _ in turns.timed(task.items(), library="saetools"):
            out = model.generate(task.token_ids, **task.options())
    turns.finish(**task.quality(out))


if __name__ == "__main__":
    serve(work)
