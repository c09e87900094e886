"""What every library measures: how often and how strongly the latents of one TopK SAE fire on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.turns import Turns


class Task:
    """Activations and SAE of a run; an item is all of the activations, once more."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.folder, self.batch, self.precision = settings["sae"], settings["batch"], settings["precision"]
        self.acts = torch.from_numpy(np.load(settings["activations"]))
        self.reference = torch.from_numpy(np.load(settings["reference"]))

    def items(self) -> Iterator[Tensor]:
        """[token, d_model], as often as wanted."""
        return repeat(self.acts, self.settings["n_items"])

    def autocast(self) -> torch.autocast:
        """Products in bfloat16, where that is what is measured."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")

    def errors(self, **statistics: Tensor) -> dict[str, float]:
        """Sum of absolute differences to the reference, over that of the reference; per statistic that was measured."""
        return {
            f"{name}_error": float((statistics[name] - true).abs().sum() / true.sum())
            for name, true in zip(("mean", "rate", "max"), self.reference, strict=True)
            if name in statistics
        }


@torch.inference_mode()
def measure_dense(task: Task, turns: Turns, encode: Callable[[Tensor], Tensor], *, library: str) -> None:
    """Encode batch by batch to dense latents and keep their sums; the other statistics too, unless only means count."""
    d_sae, n_tokens, everything = task.reference.shape[1], 0, task.settings["everything"]
    sums, fired, largest = torch.zeros(d_sae), torch.zeros(d_sae, dtype=torch.long), torch.zeros(d_sae)
    for acts in turns.timed(task.items(), library=library):
        for batch in acts.split(task.batch):
            with task.autocast():
                latents = encode(batch)
            sums += latents.sum(0, dtype=torch.float32)
            if everything:
                fired += (latents > 0).sum(0)
                largest = torch.maximum(largest, latents.amax(0).float())
        n_tokens += len(acts)
    statistics = {"mean": sums / n_tokens}
    turns.finish(**task.errors(**statistics, **({"rate": fired / n_tokens, "max": largest} if everything else {})))
