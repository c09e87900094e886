"""SAELens: mixed batches out of activations cached on disk, the same as in our store; an item is an epoch."""

from __future__ import annotations

import tempfile
from itertools import islice

from workers.harvest.task import Task
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    import torch
    from datasets import Array2D, Dataset, Features, disable_progress_bars
    from sae_lens.training.activations_store import ActivationsStore

    from saetools import ActivationStore, Site

    disable_progress_bars()
    site = Site(task.layer)
    stored = torch.cat([block.acts[site].float() for block in ActivationStore(task.settings["store"]).blocks()])
    n_contexts, length = task.tokens.shape[1], task.tokens.shape[2] - 1
    rows = stored.view(-1, length, stored.shape[1])
    features = Features({str(site): Array2D(rows.shape[1:], "float32")})
    n_batches = len(stored) // task.settings["batch"]
    with tempfile.TemporaryDirectory() as folder:
        Dataset.from_dict({str(site): rows.numpy()}, features=features).save_to_disk(folder)
        del stored
        store = ActivationsStore(
            model=None,
            dataset=None,
            cached_activations_path=folder,
            streaming=False,
            hook_name=str(site),
            hook_head_index=None,
            context_size=length,
            d_in=rows.shape[2],
            n_batches_in_buffer=len(rows),
            total_training_tokens=1,
            store_batch_size_prompts=len(rows),
            train_batch_size_tokens=task.settings["batch"],
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
        )
        for _ in turns.timed(iter(range(task.n_items)), library="sae-lens"):
            for _ in islice(store, n_batches):
                pass
    task.n_items = 1  # the cache begins with the first batch
    turns.finish(**task.quality(rows[:n_contexts].flatten(0, 1)))


if __name__ == "__main__":
    serve(work)
