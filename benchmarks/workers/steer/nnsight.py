"""nnsight: the edit written into the trace of a generation."""

from __future__ import annotations

import torch

from workers.steer.task import Hook, Task
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    from nnsight import LanguageModel

    model = LanguageModel(task.model(), tokenizer=task.tokenizer())
    layer, hook = model.model.layers[task.layer], Hook(task)
    options = task.options()
    with torch.inference_mode():
        for _ in turns.timed(task.items(), library="nnsight"):
            with model.generate({"input_ids": task.token_ids, **options}) as tracer, tracer.all():
                layer.output = hook(None, None, layer.output)
            with model.generate({"input_ids": task.token_ids, **options}) as tracer:
                out = tracer.result.save()
    turns.finish(**task.quality(out))


if __name__ == "__main__":
    serve(work)
