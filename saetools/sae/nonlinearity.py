"""What turns pre-activations into sparse latents: one small object per kind."""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saetools.errors import InputError
from saetools.sae.sparse import chunk_tokens, select_top


class Nonlinearity(Protocol):
    """Chooses the active latents of tokens from their inputs to the encoder."""

    def select(
        self, x: Float[Tensor, "token d_in"], weight: Float[Tensor, "d_in d_sae"], bias: Float[Tensor, " d_sae"]
    ) -> tuple[Float[Tensor, "token slot"], Int[Tensor, "token slot"]]:
        """Values (0 or more, 0 in unused slots) and latents of x @ weight + bias."""
        ...


class TopK(nn.Module):
    """Keeps the k largest pre-activations of a token, if positive (Gao et al., arXiv 2406.04093).

    Args:
        k: latents a token may activate.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise InputError("k", expected="1 or more", received=k, remedy="raise k")
        self.k = k

    def select(
        self, x: Float[Tensor, "token d_in"], weight: Float[Tensor, "d_in d_sae"], bias: Float[Tensor, " d_sae"]
    ) -> tuple[Float[Tensor, "token slot"], Int[Tensor, "token slot"]]:
        """Values and latents of the k largest; ties go to either."""
        values, indices = select_top(x, weight, bias, self.k)
        return values.relu_(), indices


class JumpReLU(nn.Module):
    """Keeps pre-activations above a threshold per latent; with thresholds of 0 a plain ReLU (arXiv 2407.14435).

    Args:
        threshold: per latent, 0 or more.
    """

    def __init__(self, threshold: Float[Tensor, " d_sae"]) -> None:
        super().__init__()
        self.threshold = nn.Parameter(threshold)

    def select(
        self, x: Float[Tensor, "token d_in"], weight: Float[Tensor, "d_in d_sae"], bias: Float[Tensor, " d_sae"]
    ) -> tuple[Float[Tensor, "token slot"], Int[Tensor, "token slot"]]:
        """Values and latents above their threshold, as many slots as the busiest token has."""
        parts = []
        for chunk in torch.split(x, chunk_tokens(weight.shape[1])):
            pre = torch.addmm(bias, chunk, weight)
            kept = torch.where(pre > self.threshold.to(pre.dtype), pre, 0.0).relu_()
            n_slots = int((kept > 0).sum(1).max()) if len(kept) else 0
            parts.append(kept.topk(n_slots, dim=1, sorted=False))
        width = max((part.values.shape[1] for part in parts), default=0)
        values = [nn.functional.pad(part.values, (0, width - part.values.shape[1])) for part in parts]
        indices = [nn.functional.pad(part.indices, (0, width - part.indices.shape[1])) for part in parts]
        if not parts:
            return x.new_zeros(0, 0), torch.zeros(0, 0, dtype=torch.long, device=x.device)
        return torch.cat(values), torch.cat(indices)
