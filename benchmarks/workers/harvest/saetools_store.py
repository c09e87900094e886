"""saetools: shuffled batches out of a store on disk; an item is an epoch."""

from __future__ import annotations

from workers.harvest.task import Task
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    from saetools import ActivationStore, Site

    store, site = ActivationStore(task.settings["store"]), Site(task.layer)
    for epoch, _ in enumerate(turns.timed(iter(range(task.n_items)), library="saetools")):
        for _ in store.at(site).epoch_batches(task.settings["batch"], seed=0, epoch=epoch):
            pass
    n_contexts = task.tokens.shape[1]
    block = next(store.blocks())
    task.n_items = 1  # the store begins with the first batch
    turns.finish(**task.quality(block.acts[site][block.documents < n_contexts]))


if __name__ == "__main__":
    serve(work)
