"""Passages for explanations out of a latent store."""

from __future__ import annotations

from collections.abc import Callable

from saetools.interpret.evidence import LatentPassages
from saetools.latents.store import LatentStore


def store_passages(
    store: LatentStore,
    *,
    model: str | None = None,
    n_top: int = 20,
    n_bins: int = 10,
    n_per_bin: int = 6,
    n_inactive: int = 60,
    context: int = 16,
    seed: int = 0,
) -> Callable[[int], LatentPassages]:
    """What `explain_latents` asks for the passages of a latent; name the same model there, as `acts_of`.

    Args:
        store: of `index_latents`.
        model: in which latents fire; by default the last one that was indexed.
        n_top: strongest passages.
        n_bins: equal parts of a latent's active tokens.
        n_per_bin: random passages from each.
        n_inactive: random passages in which it does not fire; about three times what is to be scored, since those from
            documents that are shown to the explainer drop out.
        context: tokens before and after the one that a passage was chosen by.
        seed: of the random ones.
    """

    def passages(latent: int) -> LatentPassages:
        record = store.open_latent(
            latent, model=model, n_top=n_top, n_bins=n_bins, n_per_bin=n_per_bin, context=context, seed=seed
        )
        spread = [passage for part in record.bins for passage in part.passages]
        inactive = store.inactive_passages(latent, n_inactive, model=model, context=context, seed=seed)
        return LatentPassages((*record.top, *spread), inactive)

    return passages
