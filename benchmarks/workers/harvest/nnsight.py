"""nnsight: a trace of each batch that saves the output of the layer and stops there."""

from __future__ import annotations

from workers.harvest.task import Task
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    import torch
    from nnsight import LanguageModel
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task.settings["model"])
    model = LanguageModel(task.model(), tokenizer=tokenizer)
    with torch.inference_mode():
        for token_ids in turns.timed(task.items(), library="nnsight"):
            with model.trace(token_ids, use_cache=False) as tracer:
                acts = model.model.layers[task.layer].output.save()
                tracer.stop()
    turns.finish(**task.quality(acts.flatten(0, 1)))


if __name__ == "__main__":
    serve(work)
