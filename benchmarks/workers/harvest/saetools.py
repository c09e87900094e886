"""saetools: `stream_activations`, which gives block by block."""

from __future__ import annotations

from workers.harvest.task import WEIGHTS, Task, in_memory
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    from activations import as_conversations

    from saetools import Site, load_model, stream_activations

    lm = load_model(task.settings["model"], dtype=WEIGHTS[task.settings["precision"]])
    in_memory(lm.model)
    site = Site(task.layer)
    contexts = [context for token_ids in task.items() for context in as_conversations(token_ids.numpy())]
    blocks = stream_activations(lm, [site], contexts, batch_tokens=task.tokens[0].numel(), skip_first=False)
    for block in turns.timed(blocks, library="saetools"):
        acts = block.acts[site]
    turns.finish(**task.quality(acts))


if __name__ == "__main__":
    serve(work)
