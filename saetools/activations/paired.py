"""The same tokens in several models, side by side: what a crosscoder trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.activations.shuffle import Activations
from saetools.errors import InputError
from saetools.models.site import Site


class PairedActivations(Activations[Any]):
    """Activations of several models on the same tokens, [token, model, d_model].

    Args:
        sources: two or more stores of one harvest each, or streams of one list of conversations, in the order of the
            models; with equal sites and pools.

    Raises:
        InputError: if they do not read the same tokens.
    """

    def __init__(self, sources: Sequence[Activations[Any]]) -> None:
        if len(sources) < 2:
            raise InputError("sources", expected="two or more", received=len(sources), remedy="pass one a model")
        self.sources = tuple(sources)
        self.sites = sources[0].sites
        first, *others = (_signature(source) for source in sources)
        for other in others:
            different = [name for name in first if first[name] != other[name]]
            if different:
                raise InputError(
                    "sources",
                    expected="the same tokens in the same pools, read at the same sites",
                    received=f"others {' and '.join(different)}",
                    remedy="harvest one list of conversations with each model, with equal settings",
                )

    def __len__(self) -> int:
        return len(self.sources[0])

    @property
    def reads(self) -> str:
        """Of the tokens, which are the same in all models."""
        return self.sources[0].reads

    def pools(self, generator: torch.Generator) -> list[tuple[Any, int]]:
        """Those of the first model; the others have the same."""
        return self.sources[0].pools(generator)

    def load(self, key: Any) -> dict[Site, Float[Tensor, "token model d_model"]]:
        """A pool of every model, stacked."""
        pools = [source.load(key) for source in self.sources]
        return {site: torch.stack([pool[site] for pool in pools], 1) for site in self.sites}

    def sample(self, n_tokens: int, *, seed: int) -> dict[Site, Float[Tensor, "token model d_model"]]:
        """Random tokens of the first pool."""
        samples = [source.sample(n_tokens, seed=seed) for source in self.sources]
        return {site: torch.stack([sample[site] for sample in samples], 1) for site in self.sites}


def _signature(source: Activations[Any]) -> dict[str, Any]:
    return {
        "tokens": source.reads,
        "sites": source.sites,
        "pools": source.pools(torch.Generator().manual_seed(0)),
    }
