"""Settings of a training run, and what it reports."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from saetools.errors import InputError
from saetools.sae.objective import AnyLoss, TopKLoss


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run."""

    d_sae: int = 8192
    """Number of latents."""
    loss: AnyLoss = TopKLoss()
    """What kind of SAE, and how sparse."""
    n_tokens: int = 10_000_000
    """Tokens to train on in all; the data is gone through as often as that takes."""
    batch_size: int = 4096
    """Tokens a step."""
    lr: float = 8e-4
    """Peak learning rate of Adam."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    decay_fraction: float = 0.3
    """Last part of the run over which the learning rate falls to 0."""
    decay: Literal["linear", "cosine"] = "linear"
    """How it falls."""
    clip_norm: float | Literal["auto"] | None = "auto"
    """Longest gradient, over all weights together; `None` leaves gradients alone. `auto` is 1 for losses with a k: Adam
    would remember the large gradients of the first steps for a thousand steps (FVU was 5 % higher after 600). It is
    `None` for losses with a sparsity coefficient, which would lose its hold on L0."""
    dead_after_tokens: int = 400_000
    """A latent that has not fired for so many tokens is dead."""
    outlier_factor: float = 8.0
    """Tokens with more than this multiple of the median norm are left out (and counted)."""
    weight_dtype: str = "float32"
    """Dtype of the weights: `float32` or `float64`."""
    encode_dtype: str = "bfloat16"
    """Dtype of the encoder product; sparse losses compute the values of the latents it chooses in `weight_dtype`.
    `int8` is for `TopKLoss` on CPUs, where it is the fastest: a few more candidates make up for its rounding."""
    shard_latents: bool = False
    """In a run of several processes: divide the latents between them, not the tokens of a batch."""
    seed: int = 0
    """Of the initial weights."""
    data_seed: int = 0
    """Of the order of the data."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    log_every: int = 25
    """Steps between lines of the log."""

    def as_json(self) -> dict[str, Any]:
        """All settings, with the name of the loss."""
        return {**dataclasses.asdict(self), "loss": {"kind": type(self.loss).__name__, **vars(self.loss)}}

    @property
    def n_steps(self) -> int:
        """Whole batches in `n_tokens`."""
        return self.n_tokens // self.batch_size

    @property
    def longest_gradient(self) -> float | None:
        """`clip_norm`, decided."""
        if self.clip_norm == "auto":
            return 1.0 if isinstance(self.loss, TopKLoss) else None
        return self.clip_norm

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        decay_steps = max(1, round(self.decay_fraction * self.n_steps))
        left = min(1.0, (self.n_steps - step) / decay_steps)
        return self.lr * warm * (left if self.decay == "linear" else (1 - math.cos(math.pi * left)) / 2)

    def check(self, *, device: torch.device | str, n_processes: int = 1) -> None:
        """Refuse settings that cannot work.

        Raises:
            InputError: naming the first of them.
        """
        for name in ("d_sae", "n_tokens", "batch_size", "lr", "checkpoint_every", "log_every", "outlier_factor"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise InputError(
                    f"config.{name}", expected="a finite number above 0", received=value, remedy="raise it"
                )
        if not 0 <= self.decay_fraction <= 1:
            received = self.decay_fraction
            raise InputError("config.decay_fraction", expected="0 to 1", received=received, remedy="pick a share")
        if self.longest_gradient is not None and not self.longest_gradient > 0:
            raise InputError("config.clip_norm", expected="more than 0", received=self.clip_norm, remedy="raise it")
        if self.weight_dtype not in ("float32", "float64"):
            raise InputError(
                "config.weight_dtype",
                expected="float32 or float64",
                received=repr(self.weight_dtype),
                remedy="pick one",
            )
        self._check_encode_dtype(torch.device(device))
        self.loss.check(self.d_sae)
        if self.shard_latents and n_processes > 1:
            self.loss.check_division(self.d_sae, n_processes)

    def _check_encode_dtype(self, device: torch.device) -> None:
        # A bfloat16 product chooses latents for weights of any dtype; a float32 one beside float64 would be neither.
        allowed = [self.weight_dtype, *(name for name in self.loss.encode_dtypes if name != "float32")]
        if self.encode_dtype not in allowed:
            raise InputError(
                "config.encode_dtype",
                expected=f"{' or '.join(allowed)} for {type(self.loss).__name__} in {self.weight_dtype}",
                received=repr(self.encode_dtype),
                remedy="pick one",
            )
        if self.encode_dtype == "int8" and device.type != "cpu":
            raise InputError(
                "config.encode_dtype",
                expected=f"{self.weight_dtype} or bfloat16 on {device}",
                received="'int8'",
                remedy="pick bfloat16; int8 pays on CPUs",
            )


@dataclass(frozen=True)
class Progress:
    """Figures over the steps since the last log line."""

    step: int
    n_steps: int
    fvu: float
    """Fraction of variance unexplained."""
    l0: float
    """Mean active latents a token."""
    dead: float
    """Share of dead latents."""
    outliers: float
    """Share of tokens left out for their norm."""
    lr: float
    tokens_per_second: float
