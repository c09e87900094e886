"""What every library trains: a TopK SAE of one shape, on the same activations in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

N_BATCHES = 4  # by default gone through again and again; one more is held out


class Task:
    """Shape, optimiser and data of a run.

    Adam has betas 0.9 and 0.999, eps 1e-8, no weight decay and one learning rate throughout: what all four libraries
    have, or can be set to.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.d_sae, self.k, self.batch = settings["d_sae"], settings["k"], settings["batch"]
        self.lr, self.n_steps, self.precision = settings["lr"], settings["n_items"], settings["precision"]
        self.bf16, self.device = self.precision == "bf16", settings.get("device", "cpu")
        acts = torch.from_numpy(np.load(settings["activations"], mmap_mode="c")).to(self.device)
        self.d_model, self.seed = acts.shape[1], settings.get("seed", 0)
        n_train = settings.get("n_batches", N_BATCHES) * self.batch
        self.train, self.held_out = acts[:n_train], acts[n_train:][: self.batch]

    def batches(self) -> Iterator[Tensor]:
        """One batch a step."""
        return islice(cycle(self.train.split(self.batch)), self.n_steps)

    def autocast(self) -> torch.autocast:
        """Products in bfloat16, where that is what is measured."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def fvu(self, reconstruct: Callable[[Tensor], Tensor]) -> float:
        """Fraction of the variance of the batch held out that a reconstruction leaves."""
        x = self.held_out
        error, variance = x - reconstruct(x), x - x.mean(0)
        return float(error.square().sum() / variance.square().sum())
