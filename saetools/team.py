"""Processes that work together (as `torchrun` starts them): what each holds, and what they tell each other.

In training, either the tokens of every batch are divided and all hold all weights, or the latents are divided and all
see all tokens. A process alone is a team of one, for which nothing here costs anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, distributed

from saetools.errors import SaetoolsError


@dataclass(frozen=True)
class Team:
    """The processes, seen by one of them.

    Args:
        rank: which one.
        size: how many.
        shard_latents: whether latents are divided (latent j is with process j modulo size); else tokens are.
    """

    rank: int = 0
    size: int = 1
    shard_latents: bool = False

    @classmethod
    def present(cls, *, shard_latents: bool = False) -> Team:
        """The process group that was started, or this process alone."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size(), shard_latents)

    def gather(self, own: Any) -> list[Any]:
        """A small object of every process."""
        parts: list[Any] = [own] * self.size
        if self.size > 1:
            distributed.all_gather_object(parts, own)
        return parts

    def own_tokens(self, batch: Shaped[Tensor, "token ..."]) -> Shaped[Tensor, "own ..."]:
        """This process' part of a batch."""
        return batch if self.shard_latents else batch.tensor_split(self.size)[self.rank]

    def own_latents(self, rows: Shaped[Tensor, "d_sae ..."]) -> Shaped[Tensor, "own ..."]:
        """This process' part of a tensor with a row for each latent."""
        return rows[self.rank :: self.size].contiguous() if self._divides_latents else rows

    def n_own_latents(self, n: int) -> int:
        """How many of the first n latents are with this process."""
        return -(-(n - self.rank) // self.size) if self._divides_latents else n

    def all_latents(self, rows: Shaped[Tensor, "own ..."]) -> Shaped[Tensor, "d_sae ..."]:
        """The parts of all processes together; the inverse of `own_latents`."""
        if not self._divides_latents:
            return rows
        sizes = self._gather(torch.tensor([len(rows)], device=rows.device)).flatten().tolist()
        whole = rows.new_empty(sum(sizes), *rows.shape[1:])
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        for rank, part in enumerate(self._gather(padded)):
            whole[rank :: self.size] = part[: sizes[rank]]
        return whole

    def over_tokens(self, own: Tensor) -> Tensor:
        """The sum over processes, in place, if they divide the tokens."""
        return own if self._divides_latents else self._sum(own)

    def over_latents(self, own: Tensor) -> Tensor:
        """The sum over processes, in place, if they divide the latents."""
        return self._sum(own) if self._divides_latents else own

    def over_both(self, own: Tensor) -> Tensor:
        """The sum over processes, in place."""
        return self._sum(own)

    def least(self, own: Tensor) -> Tensor:
        """The minimum over processes, in place."""
        if self.size > 1:
            distributed.all_reduce(own, distributed.ReduceOp.MIN)
        return own

    def agree(self, problem: Exception | None) -> None:
        """Raise what went wrong here, or say that it did elsewhere: nobody is to wait for a process that has ended."""
        failed = torch.tensor(int(problem is not None))
        if self.size > 1:
            distributed.all_reduce(failed)
        if problem is not None:
            raise problem
        if failed:
            raise SaetoolsError("another process of this run has failed; see its message")

    def keep_top(self, values: Float[Tensor, "token slot"], k: int) -> Float[Tensor, "token slot"]:
        """Where latents are divided: each token's k largest values of all processes stay, the rest become 0.

        Args:
            values: 0 or more, with equally many slots in all processes.
            k: values that stay.
        """
        if not self._divides_latents:
            return values
        n_slots = values.shape[1]
        everywhere = self._gather(values).transpose(0, 1).flatten(1)
        top = everywhere.topk(k, dim=1).indices
        kept = torch.zeros_like(everywhere, dtype=torch.bool).scatter_(1, top, value=True)
        return torch.where(kept[:, self.rank * n_slots : (self.rank + 1) * n_slots], values, 0.0)

    def among_top(self, values: Float[Tensor, " pair"], n: int) -> Bool[Tensor, " pair"]:
        """Which values are among the n largest of all processes."""
        if self.size == 1:
            return torch.ones_like(values, dtype=torch.bool)
        sizes = self._gather(torch.tensor([len(values)], device=values.device)).flatten()
        if int(sizes.sum()) <= n:
            return torch.ones_like(values, dtype=torch.bool)
        padded = values.new_full((int(sizes.max()),), -torch.inf)
        padded[: len(values)] = values
        return values >= self._gather(padded).flatten().topk(n).values[-1]

    @property
    def _divides_latents(self) -> bool:
        return self.shard_latents and self.size > 1

    def _sum(self, own: Tensor) -> Tensor:
        if self.size > 1:
            distributed.all_reduce(own)
        return own

    def _gather(self, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(parts, own.contiguous())
        return torch.stack(parts)


ALONE = Team()
"""A process by itself."""
