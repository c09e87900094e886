"""A process of several that train SAEs together: `torchrun --nproc-per-node 2 team_worker.py OUT`.

With a second argument, only that run, and the disk is full from step 25 on.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
from pathlib import Path

import torch
from planted import Planted

from saetools.sae import (
    BatchTopKLoss,
    GatedLoss,
    JumpReLULoss,
    MatryoshkaLoss,
    Progress,
    StandardLoss,
    TopKLoss,
    TrainConfig,
    train_sae,
)

EXACT = TrainConfig(
    d_sae=96,
    n_tokens=50 * 64,
    batch_size=64,
    warmup_steps=5,
    checkpoint_every=20,
    log_every=1,
    lr=2e-3,
    dead_after_tokens=64,
    weight_dtype="float64",
    encode_dtype="float64",
)
DENSE = {"sparsity": 0.5, "target_l0": 4.0, "sparsity_warmup_steps": 10}
LOSSES = {
    "topk": TopKLoss(k=3, k_aux=30),
    "batch_topk": BatchTopKLoss(k=3, k_aux=30),
    "matryoshka": MatryoshkaLoss(k=3, shares=(0.25, 0.5, 1.0)),
    "standard": StandardLoss(**DENSE),
    "gated": GatedLoss(**DENSE),
    "jumprelu": JumpReLULoss(**DENSE),
}
DIVISIONS = {
    name: ("tokens", "latents") if name in ("topk", "batch_topk", "matryoshka") else ("tokens",) for name in LOSSES
}
RUNS = {
    f"{name}-{division}": dataclasses.replace(
        EXACT, loss=LOSSES[name], clip_norm=1.0, shard_latents=division == "latents"
    )
    for name, divisions in DIVISIONS.items()
    for division in divisions
}
RUNS |= {
    f"{name}-float32": dataclasses.replace(RUNS[name], weight_dtype="float32", encode_dtype="float32")
    for name in ("topk-tokens", "topk-latents", "jumprelu-tokens")
}
"""50 steps each; latents are revived on the way."""


def fill_disk(progress: Progress) -> None:
    if progress.step == 25:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    out, *broken_off = sys.argv[1:]
    for name in broken_off or RUNS:
        train_sae(Planted(), RUNS[name], Path(out) / name, on_progress=fill_disk if broken_off else None)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
