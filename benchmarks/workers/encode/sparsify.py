"""sparsify: `SparseCoder.encode`, batch by batch, and statistics of the active latents that it returns."""

from __future__ import annotations

import os

from workers.encode.task import Task
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels are for GPUs
    import torch
    from sparsify import SparseCoder

    torch.set_grad_enabled(False)
    sae = SparseCoder.load_from_disk(task.folder)
    d_sae, n_tokens = task.reference.shape[1], 0
    sums, fired, largest = torch.zeros(d_sae), torch.zeros(d_sae), torch.zeros(d_sae)
    for acts in turns.timed(task.items(), library="eai-sparsify"):
        for batch in acts.split(task.batch):
            with task.autocast():
                out = sae.encode(batch)
            latents, values = out.top_indices.flatten(), out.top_acts.flatten().float()
            sums.index_add_(0, latents, values)
            fired.index_add_(0, latents, (values > 0).float())
            largest.scatter_reduce_(0, latents, values, "amax")
        n_tokens += len(acts)
    turns.finish(**task.errors(mean=sums / n_tokens, rate=fired / n_tokens, max=largest))


if __name__ == "__main__":
    serve(work)
