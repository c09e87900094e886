"""The bare model, stopped by an exception once the layer has run: what nobody who runs the model can do without."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workers.harvest.task import Task, autocast
from workers.turns import Turns, serve


class Stop(Exception):  # noqa: N818 - a signal, not an error
    """Carries the output of the layer."""


def _stop(_module: nn.Module, _args: object, output: Tensor) -> None:
    raise Stop(output)


@torch.inference_mode()
def forward(model: nn.Module, token_ids: Tensor) -> Tensor:
    """The output [context, pos, d_model] of the layer on which `_stop` hangs."""
    try:
        model(input_ids=token_ids, use_cache=False)
    except Stop as stopped:
        return stopped.args[0]
    raise AssertionError("the layer did not run")


def stopping(model: nn.Module, layer: int) -> nn.Module:
    """The model, to be stopped after a layer."""
    model.model.layers[layer].register_forward_hook(_stop)
    return model


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    model = stopping(task.model(), task.layer)
    for token_ids in turns.timed(task.items(), library="transformers"):
        with autocast(task.settings["precision"]):
            acts = forward(model, token_ids)
    turns.finish(**task.quality(acts.flatten(0, 1)))


if __name__ == "__main__":
    serve(work)
