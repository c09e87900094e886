"""steering-vectors: a `SteeringVector` applied to the layer."""

from __future__ import annotations

import torch

from workers.steer.task import Task
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    from steering_vectors import SteeringVector

    model = task.model()
    vector = SteeringVector(layer_activations={task.layer: task.vector}, layer_type="decoder_block")
    with torch.inference_mode(), vector.apply(model, multiplier=1.0):
        for _ in turns.timed(task.items(), library="steering-vectors"):
            out = model.generate(task.token_ids, **task.options())
    turns.finish(**task.quality(out))


if __name__ == "__main__":
    serve(work)
