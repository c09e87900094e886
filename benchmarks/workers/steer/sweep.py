"""saetools: all strengths of an edit, as one sweep or one after the other; an item is all of them."""

from __future__ import annotations

import torch

from workers.steer.ours import edits
from workers.steer.task import Task, in_memory
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    from saetools import SamplingConfig, generate, load_model, steered_model

    lm = load_model(task.settings["model"])
    in_memory(lm.model)
    questions = task.settings["questions"][: task.settings["batch"]]
    variants = {str(strength): edits(task, strength) for strength in task.settings["strengths"]}
    models = {name: steered_model(lm, each) for name, each in variants.items()}
    n_rows = len(questions) * (len(variants) if task.settings["how"] == "together" else 1)
    config = SamplingConfig(task.n_new, temperature=0.0, batch_rows=n_rows)
    for _ in turns.timed(task.items(), library="saetools"):
        if task.settings["how"] == "together":
            answers = generate(lm, questions, variants=variants, config=config)
        elif task.settings["how"] == "one by one":
            answers = [
                answer
                for name, each in variants.items()
                for answer in generate(lm, questions, variants={name: each}, config=config)
            ]
        else:
            answers = []
            with torch.inference_mode():
                for model in models.values():
                    model.generate(task.token_ids, **task.options())
    said = {(answer.variant, answer.prompt): answer.token_ids for answer in answers}
    turns.finish(n_tokens=sum(map(len, said.values())), answers={f"{v}/{p}": ids for (v, p), ids in said.items()})


if __name__ == "__main__":
    serve(work)
