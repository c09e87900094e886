"""saetools: `harvest` of one batch into a store of its own, with its hashes and its manifest."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from workers.harvest.task import WEIGHTS, Task, in_memory
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    from activations import as_conversations

    from saetools import HarvestConfig, Site, harvest, load_model

    lm = load_model(task.settings["model"], dtype=WEIGHTS[task.settings["precision"]])
    in_memory(lm.model)
    site = Site(task.layer)
    config = HarvestConfig(batch_tokens=task.tokens[0].numel(), skip_first=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "store")
        for token_ids in turns.timed(task.items(), library="saetools"):
            shutil.rmtree(path, ignore_errors=True)
            store = harvest(lm, [site], as_conversations(token_ids.numpy()), path, config=config)
        acts = next(store.blocks()).acts[site]
    turns.finish(**task.quality(acts))


if __name__ == "__main__":
    serve(work)
