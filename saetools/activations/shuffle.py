"""Shuffled batches of activations from bounded memory: pools of tokens one after the other, each shuffled whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.errors import InputError
from saetools.models.site import Site

Key = TypeVar("Key")


class Activations(ABC, Generic[Key]):
    """Activations of some sites as `train_saes` wants them: epochs of shuffled batches that can be entered anywhere.

    An epoch is a sequence of pools, each of which fits into memory. Tokens are shuffled within a pool, and what pools
    are made of is shuffled before. The number of tokens of a pool is known without reading it, so that a resumed run
    reads no more than what it still needs.
    """

    sites: tuple[Site, ...]

    @abstractmethod
    def __len__(self) -> int:
        """Tokens of an epoch."""

    @property
    @abstractmethod
    def reads(self) -> str:
        """SHA-256 of the tokens that are read, in their order."""

    @abstractmethod
    def pools(self, generator: torch.Generator) -> list[tuple[Key, int]]:
        """What each pool of an epoch holds, in the order that the generator gives, and its number of tokens."""

    @abstractmethod
    def load(self, key: Key) -> dict[Site, Float[Tensor, "token *model d_model"]]:
        """The tokens of a pool; equal keys give equal bytes."""

    def loaded(self, keys: Iterator[Key]) -> Iterator[dict[Site, Float[Tensor, "token *model d_model"]]]:
        """The tokens of some pools."""
        return map(self.load, keys)

    def n_batches(self, batch_size: int) -> int:
        """Whole batches of one epoch."""
        return len(self) // batch_size

    def epoch_batches(
        self, batch_size: int, *, seed: int, epoch: int = 0, start: int = 0
    ) -> Iterator[Mapping[Site, Float[Tensor, "batch *model d_model"]]]:
        """Shuffled batches of one epoch; equal arguments give equal batches.

        Tokens that do not fill the last batch are left out.

        Args:
            batch_size: tokens of a batch.
            seed: of the shuffle.
            epoch: every epoch has an order of its own.
            start: leave out so many batches, reading none of the pools that lie before (to resume).
        """
        generator = _generator(seed, epoch)
        keys, orders, to_skip = [], [], start * batch_size
        for key, n_tokens in self.pools(generator):
            order = torch.randperm(n_tokens, generator=generator)
            if to_skip < n_tokens:
                keys.append(key)
                orders.append(order[to_skip:])
            to_skip = max(0, to_skip - n_tokens)
        rest: dict[Site, Tensor] = {}
        n_rest = 0
        for order, pool in zip(orders, self.loaded(iter(keys)), strict=True):
            n_fill = (batch_size - n_rest) % batch_size
            first, others = order[:n_fill], order[n_fill:]
            if n_rest:
                rest = {site: torch.cat([rest[site], acts[first]]) for site, acts in pool.items()}
                n_rest += len(first)
                if n_rest < batch_size:
                    continue
                yield rest
            n_whole = len(others) // batch_size * batch_size
            for part in others[:n_whole].view(-1, batch_size):
                yield {site: acts[part] for site, acts in pool.items()}
            rest = {site: acts[others[n_whole:]] for site, acts in pool.items()}
            n_rest = len(others) - n_whole
            del pool  # before the next one is loaded

    def sample(self, n_tokens: int, *, seed: int) -> Mapping[Site, Float[Tensor, "token *model d_model"]]:
        """Random tokens of the first pool of the first epoch, as many as asked for or as it has."""
        key, order = self.first_pool(seed)
        return {site: acts[order[:n_tokens]] for site, acts in self.load(key).items()}

    def first_pool(self, seed: int) -> tuple[Key, Int[Tensor, " token"]]:
        """The first pool of the first epoch and the order of its tokens."""
        generator = _generator(seed, 0)
        key, n_tokens = self.pools(generator)[0]
        return key, torch.randperm(n_tokens, generator=generator)

    def at(self, site: Site) -> SiteActivations:
        """One of the sites, as `train_sae` wants it.

        Raises:
            InputError: if it is not among them.
        """
        if site not in self.sites:
            raise InputError(
                "site", expected=f"one of {', '.join(map(str, self.sites))}", received=str(site), remedy="pick one"
            )
        return SiteActivations(self, site)


@dataclass(frozen=True)
class SiteActivations:
    """One site of some activations, in shuffled batches.

    Args:
        source: activations of this site and maybe others.
        site: which.
    """

    source: Activations[Any]
    site: Site

    def n_batches(self, batch_size: int) -> int:
        """Whole batches of one epoch."""
        return self.source.n_batches(batch_size)

    def epoch_batches(
        self, batch_size: int, *, seed: int, epoch: int = 0, start: int = 0
    ) -> Iterator[Float[Tensor, "batch *model d_model"]]:
        """Shuffled batches of one epoch; see `Activations.epoch_batches`."""
        batches = self.source.epoch_batches(batch_size, seed=seed, epoch=epoch, start=start)
        return (batch[self.site] for batch in batches)

    def sample(self, n_tokens: int, *, seed: int) -> Float[Tensor, "token *model d_model"]:
        """Random tokens."""
        return self.source.sample(n_tokens, seed=seed)[self.site]


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)
