"""What turns pre-activations into sparse latents: one small object per kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saetools.errors import InputError
from saetools.sae.sparse import chunk_tokens, select_top, select_top_of_candidates

Tokens = Float[Tensor, "token d_in"]
Weight = Float[Tensor, "d_in d_sae"]
Bias = Float[Tensor, " d_sae"]
Values = Float[Tensor, "token slot"]  # 0 or more; 0 in unused slots
Slots = Int[Tensor, "token slot"]
Chosen = Int[Tensor, " latent"] | slice
Fired = tuple[Float[Tensor, "token latent"], Bool[Tensor, "token latent"]]
_ALL = slice(None)
_PART = 4096  # tokens whose candidates exist at the same time: few enough for the cache


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
        self, x: Tokens, weight: Weight, bias: Bias, *, encode_dtype: torch.dtype | None = None
    ) -> tuple[Values, Slots]:
        """Values and latents of the k largest; ties go to either.

        Args:
            x: tokens.
            weight: encoder weights.
            bias: of the encoder.
            encode_dtype: of a product that only proposes half as many latents again, of which the values in the dtype
                of the weights then choose.
        """
        if encode_dtype in (None, weight.dtype) or not len(x):
            values, indices = select_top(x, weight, bias, self.k)
            return values.relu_(), indices
        n = self.k + -(-self.k // 2)
        parts = [
            select_top_of_candidates(part, weight.T, bias, self.k, n=n, dtype=encode_dtype)
            for part in torch.split(x, _PART)
        ]
        values, indices = map(torch.cat, zip(*parts, strict=True))
        return values.relu_(), indices


class ReLU(nn.Module):
    """Keeps positive pre-activations: the standard SAE (arXiv 2309.08600)."""

    def select(self, x: Tokens, weight: Weight, bias: Bias) -> tuple[Values, Slots]:
        """Values and latents above 0, as many slots as the busiest token has."""
        return _select_active(x, len(bias), lambda chunk: self.fire(chunk, weight, bias, _ALL))

    def fire(self, x: Tokens, weight: Weight, bias: Bias, latents: Chosen) -> Fired:
        """Pre-activations of some latents, whose weights and biases are given, and whether they are above 0."""
        pre = torch.addmm(bias, x, weight)
        return pre, pre > 0


class JumpReLU(nn.Module):
    """Keeps positive pre-activations above a threshold per latent (arXiv 2407.14435).

    Also what a BatchTopK or Matryoshka SAE uses after training, with the threshold that training learnt.

    Args:
        threshold: per latent, 0 or more.
    """

    def __init__(self, threshold: Float[Tensor, " d_sae"]) -> None:
        super().__init__()
        self.threshold = nn.Parameter(threshold)

    def select(self, x: Tokens, weight: Weight, bias: Bias) -> tuple[Values, Slots]:
        """Values and latents above their threshold, as many slots as the busiest token has."""
        return _select_active(x, len(bias), lambda chunk: self.fire(chunk, weight, bias, _ALL))

    def fire(self, x: Tokens, weight: Weight, bias: Bias, latents: Chosen) -> Fired:
        """Pre-activations of some latents, whose weights and biases are given, and whether they pass the threshold."""
        pre = torch.addmm(bias, x, weight)
        return pre, pre > self.threshold[latents].to(weight.dtype).relu()


class Gated(nn.Module):
    """Lets a gate x W + b_enc decide which latents are active, and relu(x W exp(r_mag) + b_mag) how strongly.

    Rajamanoharan et al., arXiv 2404.16014; the SAE's `b_enc` is the paper's b_gate.

    Args:
        r_mag: log of the ratio of magnitude weights to gate weights, per latent.
        b_mag: bias of the magnitude, per latent.
    """

    def __init__(self, r_mag: Float[Tensor, " d_sae"], b_mag: Float[Tensor, " d_sae"]) -> None:
        super().__init__()
        self.r_mag = nn.Parameter(r_mag)
        self.b_mag = nn.Parameter(b_mag)

    def select(self, x: Tokens, weight: Weight, bias: Bias) -> tuple[Values, Slots]:
        """Values and latents whose gate is open, as many slots as the busiest token has."""
        return _select_active(x, len(bias), lambda chunk: self.fire(chunk, weight, bias, _ALL))

    def fire(self, x: Tokens, weight: Weight, bias: Bias, latents: Chosen) -> Fired:
        """Strengths of some latents, whose weights and biases are given, and whether their gate is open."""
        pre = x @ weight
        r_mag, b_mag = self.r_mag[latents].to(pre.dtype), self.b_mag[latents].to(pre.dtype)
        strength = torch.addcmul(b_mag, pre, r_mag.exp())
        return strength, (pre + bias > 0) & (strength > 0)


class AbsTopK(nn.Module):
    """Keeps the k pre-activations of a token that are furthest from 0, with their signs (arXiv 2510.00404).

    Args:
        k: latents a token activates.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise InputError("k", expected="1 or more", received=k, remedy="raise k")
        self.k = k

    def select(self, x: Tokens, weight: Weight, bias: Bias) -> tuple[Values, Slots]:
        """Signed values and latents; ties go to either."""
        parts = []
        for chunk in torch.split(x, chunk_tokens(len(bias), x.device)):
            pre = torch.addmm(bias, chunk, weight)
            indices = pre.abs().topk(self.k, dim=1, sorted=False).indices
            parts.append((pre.gather(1, indices), indices))
        values, slots = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(slots)


class MatchingPursuit(nn.Module):
    """Takes away the decoder row that explains most of what is left of a token, again and again (arXiv 2506.03093).

    The encoder is the decoder here; `b_enc` is not used.

    Args:
        residual_threshold: a token is done when what is left of it is shorter; 0 for never.
        max_steps: of taking away; d_in by default.
        stop_on_repeat: a token is done when a step adds no latent to those it has.
    """

    def __init__(self, residual_threshold: float, *, max_steps: int | None = None, stop_on_repeat: bool = True) -> None:
        super().__init__()
        self.residual_threshold = residual_threshold
        self.max_steps = max_steps
        self.stop_on_repeat = stop_on_repeat

    def select(self, x: Tokens, weight: Weight, bias: Bias) -> tuple[Values, Slots]:
        """Values and latents in the order in which they were taken."""
        rows = weight.T
        values = x.new_zeros(len(x), 0)
        slots = torch.zeros(len(x), 0, dtype=torch.long, device=x.device)
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(self.max_steps or x.shape[1]):
            best = torch.cat([(part @ weight).argmax(1) for part in torch.split(x, chunk_tokens(len(bias), x.device))])
            step = (x * rows[best]).sum(1).relu().masked_fill(done, 0.0)
            x = x - step[:, None] * rows[best]
            known = slots == best[:, None]  # in a slot of an earlier step; unused slots hold 0 and may match too
            known &= values > 0
            values = values + known * step[:, None]
            is_new = (step > 0) & ~known.any(1)
            values = torch.cat([values, (step * is_new)[:, None]], 1)
            slots = torch.cat([slots, torch.where(is_new, best, 0)[:, None]], 1)
            if self.stop_on_repeat:
                done |= ~is_new
            if self.residual_threshold > 0:
                done |= torch.linalg.vector_norm(x, dim=1) < self.residual_threshold
            if bool(done.all()):
                break
        return values, slots


Nonlinearity = TopK | ReLU | JumpReLU | Gated | AbsTopK | MatchingPursuit
"""Chooses the active latents of tokens: `select(x, weight, bias)` gives values and latents of x @ weight and bias."""


def _select_active(x: Tensor, d_sae: int, fire: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Values and latents that `fire` marks in a chunk of tokens, in as many slots as the busiest token needs."""
    tokens, latents, values = [], [], []
    size = chunk_tokens(d_sae, x.device)
    for number, chunk in enumerate(torch.split(x, size)):
        strengths, active = fire(chunk)
        rows, columns = active.nonzero(as_tuple=True)
        tokens.append(rows + number * size)
        latents.append(columns)
        values.append(strengths[rows, columns])
    token = torch.cat(tokens)
    counts = torch.bincount(token, minlength=len(x))
    slot = torch.arange(len(token), device=x.device) - (counts.cumsum(0) - counts)[token]
    shape = len(x), int(counts.max()) if len(x) else 0
    kept, slots = values[0].new_zeros(shape), latents[0].new_zeros(shape)
    kept[token, slot] = torch.cat(values)
    slots[token, slot] = torch.cat(latents)
    return kept, slots
