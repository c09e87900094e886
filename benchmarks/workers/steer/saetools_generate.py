"""saetools: its own `generate`, which edits rows one by one."""

from __future__ import annotations

import torch

from workers.steer.ours import edits
from workers.steer.task import Task, in_memory
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    from saetools import SamplingConfig, generate, load_model

    lm = load_model(task.settings["model"])
    in_memory(lm.model)
    questions = task.settings["questions"][: task.settings["batch"]]
    config = SamplingConfig(task.n_new, temperature=0.0, batch_rows=len(questions))
    variants = {"edited": edits(task)}
    for _ in turns.timed(task.items(), library="saetools"):
        answers = generate(lm, questions, variants=variants, config=config)
    rows = [torch.tensor(answer.token_ids + (-1,) * (task.n_new - len(answer.token_ids))) for answer in answers]
    turns.finish(**task.quality(torch.stack(rows)))


if __name__ == "__main__":
    serve(work)
