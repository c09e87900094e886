"""nnsight: the edit written into the trace of a generation."""

from __future__ import annotations

import torch

from workers.steer.task import Hook, Task
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    from nnsight import TransformersModel

    model = TransformersModel(task.model(), tokenizer=task.tokenizer(), task="text-generation")
    layer, hook = model.model.layers[task.layer], Hook(task)
    options = task.options()
    with torch.inference_mode():
        for _ in turns.timed(task.items(), library="nnsight"):
            with model.generate({"input_ids": task.token_ids, **options}) as tracer:
                for _step in tracer.iter[: task.n_new]:
                    layer.output = hook(None, None, layer.output)
                out = tracer.result.save()
    turns.finish(**task.quality(out))


if __name__ == "__main__":
    serve(work)
