"""Active (token, latent) pairs of one model over a corpus, by token and by latent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, Shaped, UInt, UInt16, UInt32
from torch import Tensor

from saetools.latents.arrays import from_bits
from saetools.sae.sparse import SparseLatents, TokenMajorPairs


@dataclass(frozen=True)
class RowPairs:
    """Pairs in the order of rows (tokens of the corpus).

    Args:
        row_starts: first pair of each row, and their end.
        row_latents: latent of each pair.
        row_values: its activation, in 16 bits.
    """

    row_starts: Int[np.ndarray, " row_or_end"]
    row_latents: UInt[np.ndarray, " pair"]
    row_values: UInt16[np.ndarray, " pair"]

    def at(
        self, rows: Integer[np.ndarray, " row"]
    ) -> tuple[Int[np.ndarray, " pair"], Int[np.ndarray, " pair"], Float[np.ndarray, " pair"]]:
        """The pairs of some rows: index into `rows`, latent, activation."""
        starts = self.row_starts[rows]
        counts = self.row_starts[rows + 1] - starts
        owners = np.repeat(np.arange(len(rows)), counts)
        places = np.arange(len(owners)) + np.repeat(starts - np.cumsum(counts) + counts, counts)
        return owners, self.row_latents[places].astype(np.int64), from_bits(self.row_values[places])

    def of(self, latent: int, first: int, last: int) -> Float[np.ndarray, " row"]:
        """One latent's activation on the rows from `first` to before `last`."""
        starts = self.row_starts[first : last + 1]
        span = slice(int(starts[0]), int(starts[-1]))
        found = np.flatnonzero(self.row_latents[span] == latent)
        acts = np.zeros(last - first, np.float32)
        acts[np.searchsorted(starts, found + span.start, "right") - 1] = from_bits(self.row_values[span][found])
        return acts


@dataclass(frozen=True)
class LatentPairs:
    """Pairs in the order of latents, those of a latent by the size of the activation, and what they sum up to.

    Args:
        latent_starts: first pair of each latent, and their end.
        latent_rows: row of each pair.
        latent_values: its activation, in 16 bits.
        counts: pairs of each latent by dataset and role.
        sums: of their activations.
        squares: sum of each latent's squared activations.
        n_documents: documents in which each latent is active.
        top_documents: those in which its size is largest on average, largest first.
        top_document_means: that average, over the document's tokens; 0 where there are fewer documents.
    """

    latent_starts: Int[np.ndarray, " latent_or_end"]
    latent_rows: UInt32[np.ndarray, " pair"]
    latent_values: UInt16[np.ndarray, " pair"]
    counts: Int[np.ndarray, "d_sae dataset role"]
    sums: Float[np.ndarray, "d_sae dataset role"]
    squares: Float[np.ndarray, " d_sae"]
    n_documents: Int[np.ndarray, " d_sae"]
    top_documents: UInt32[np.ndarray, "d_sae top"]
    top_document_means: Shaped[np.ndarray, "d_sae top"]

    def of(self, latent: int) -> tuple[UInt32[np.ndarray, " pair"], UInt16[np.ndarray, " pair"]]:
        """Rows and activations of a latent, the largest first; still on disk."""
        span = slice(int(self.latent_starts[latent]), int(self.latent_starts[latent + 1]))
        return self.latent_rows[span], self.latent_values[span]


@dataclass(frozen=True)
class CoactivePairs:
    """The latents that are active together with each latent.

    Args:
        coactive: the latents, the one with the largest cosine first.
        coactive_measures: share of tokens, pointwise mutual information, cosine; all 0 where there are fewer.
    """

    coactive: UInt32[np.ndarray, "d_sae other"]
    coactive_measures: Float[np.ndarray, "d_sae other 3"]


def sparse_pairs(latents: SparseLatents, rows: Int[Tensor, " token"], n_rows: int) -> TokenMajorPairs:
    """Active latents as pairs, without padding.

    Args:
        latents: of some tokens.
        rows: which row each of these tokens is, ascending.
        n_rows: rows in all; those that are no token's have no pairs.
    """
    used = latents.values != 0
    tokens = rows[:, None].expand(used.shape)[used.cpu()]
    return TokenMajorPairs(tokens, latents.indices[used].cpu(), latents.values[used].float().cpu(), n_rows)


def join_pairs(pieces: list[TokenMajorPairs], n_rows: int) -> TokenMajorPairs:
    """Pairs of different tokens, in the order of tokens."""
    tokens = torch.cat([torch.zeros(0, dtype=torch.long), *(piece.tokens for piece in pieces)])
    order = torch.argsort(tokens, stable=True)
    latents = torch.cat([torch.zeros(0, dtype=torch.long), *(piece.latents for piece in pieces)])
    values = torch.cat([torch.zeros(0), *(piece.values for piece in pieces)])
    return TokenMajorPairs(tokens[order], latents[order], values[order], n_rows)
