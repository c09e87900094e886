"""sparsify: a `SparseCoder` and the calls that its `Trainer` makes in a step, in their order.

The trainer itself runs only inside a language model's forward pass; the copies of activations that it makes there are
left out. Its autocast is for GPUs only; in bfloat16 we put the same one around the forward pass. Its precision of
float32 products is set as `Trainer.fit` sets it.
"""

from __future__ import annotations

import os

from workers.train_sae.task import Task
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    if task.device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels are for GPUs
    import torch
    from sparsify import SparseCoder, SparseCoderConfig, TrainConfig

    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    config = TrainConfig(SparseCoderConfig(num_latents=task.d_sae, k=task.k), optimizer="adam", lr=task.lr)
    coder = SparseCoder(task.d_model, config.sae, device=task.device, dtype=torch.float32)
    coder.b_dec.data = task.train.mean(0)
    optimizer = torch.optim.Adam(coder.parameters(), lr=config.lr)
    since_fired = torch.zeros(task.d_sae, dtype=torch.long, device=task.device)
    for x in turns.timed(task.batches(), library="eai-sparsify"):
        coder.set_decoder_norm_to_unit_norm()
        with task.autocast():
            out = coder(x, total_variance=(x - x.mean(0)).square().sum())
        fired = torch.zeros(task.d_sae, dtype=torch.bool, device=task.device)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since_fired += len(x)
        since_fired[fired] = 0
    coder.set_decoder_norm_to_unit_norm()
    n_dead = int((since_fired > config.dead_feature_threshold).sum())
    turns.finish(fvu=task.fvu(lambda x: coder(x).sae_out), n_dead=n_dead)


if __name__ == "__main__":
    serve(work)
