"""repeng: a `ControlModel` with a vector at the layer."""

from __future__ import annotations

import torch

from workers.steer.task import Task
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    from repeng import ControlModel, ControlVector

    model = ControlModel(task.model(), [task.layer])
    model.set_control(ControlVector(model_type="llama", directions={task.layer: task.vector.numpy()}), 1.0)
    with torch.inference_mode():
        for _ in turns.timed(task.items(), library="repeng"):
            out = model.generate(task.token_ids, **task.options())
    turns.finish(**task.quality(out))


if __name__ == "__main__":
    serve(work)
