"""Activations with known features, and a process that trains on them, to be killed.

`python planted.py OUT SETTINGS` prints every step and then waits for a line before the next.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

D_MODEL = 24


@dataclass(frozen=True)
class Planted:
    """Sparse sums of unit directions, off-centre and at the scale of a residual stream.

    Args:
        n_features: planted directions.
        n_active: of these in each token.
        n_batches_: batches of an epoch.
    """

    n_features: int = 36
    n_active: int = 3
    n_batches_: int = 16

    @property
    def directions(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.nn.functional.normalize(torch.randn(self.n_features, D_MODEL, generator=generator), dim=1)

    @property
    def offset(self) -> Tensor:
        return 20 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(2))

    def n_batches(self, batch_size: int) -> int:
        return self.n_batches_

    def epoch_batches(self, batch_size: int, *, seed: int, epoch: int = 0, start: int = 0) -> Iterator[Tensor]:
        for index in range(start, self.n_batches_):
            yield self.draw(batch_size, seed * 1_000_000 + epoch * 1000 + index)

    def sample(self, n_tokens: int, *, seed: int) -> Tensor:
        return self.draw(min(n_tokens, 4096), seed + 99)

    def draw(self, n_tokens: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        features = torch.rand(n_tokens, self.n_features, generator=generator).topk(self.n_active, dim=1).indices
        strengths = torch.rand(n_tokens, self.n_active, generator=generator) * 60 + 20
        noise = torch.randn(n_tokens, D_MODEL, generator=generator)
        return (strengths[..., None] * self.directions[features]).sum(1) + self.offset + noise


if __name__ == "__main__":
    from saetools.sae import Progress, TrainConfig, objective, train_sae

    torch.set_num_threads(1)

    def report(progress: Progress) -> None:
        print(progress.step, flush=True)
        sys.stdin.readline()

    settings = json.loads(sys.argv[2])
    kind = getattr(objective, settings["loss"].pop("kind"))
    config = TrainConfig(**settings | {"loss": kind(**settings["loss"])})
    train_sae(Planted(), config, sys.argv[1], on_progress=report)
