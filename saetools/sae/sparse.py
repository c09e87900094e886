"""Latent activations kept sparse: a few (latent, value) pairs a token, and the products that training needs of them.

A [tokens, d_sae] matrix exists only for a bounded chunk of tokens, inside `select_top`. Decoding is an embedding bag;
its gradient with respect to the latents is one dot product a pair; gradients of weights are products of a compressed
sparse matrix with a dense one.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22  # entries of the dense pre-activations that exist at the same time


@dataclass(frozen=True)
class SparseLatents:
    """Active latents of some tokens, padded with value 0 where a token has fewer.

    Args:
        indices: latent of each slot; no latent twice in a token, but for padding.
        values: its activation, 0 or more; 0 in padded slots.
        d_sae: number of latents.
    """

    indices: Int[Tensor, "token slot"]
    values: Float[Tensor, "token slot"]
    d_sae: int

    def __len__(self) -> int:
        return len(self.indices)

    def to_dense(self) -> Float[Tensor, "token d_sae"]:
        """The full matrix; for few tokens only."""
        dense = self.values.new_zeros(len(self), self.d_sae)
        return dense.scatter_add_(1, self.indices, self.values)

    def of(self, latents: Int[Tensor, " latent"]) -> Float[Tensor, "token latent"]:
        """Activations of some latents, 0 where inactive; no latent may be asked for twice."""
        column = torch.full((self.d_sae,), -1, dtype=torch.long, device=self.indices.device)
        column[latents] = torch.arange(len(latents), device=latents.device)
        found = column[self.indices]
        values = torch.where(found >= 0, self.values, 0.0)
        out = self.values.new_zeros(len(self), len(latents))
        return out.scatter_add_(1, found.clamp_(min=0), values)

    def sums(self) -> Float[Tensor, " d_sae"]:
        """Sum of every latent's activations over the tokens."""
        return self.values.new_zeros(self.d_sae).index_add_(0, self.indices.flatten(), self.values.flatten())

    def counts(self) -> Float[Tensor, " d_sae"]:
        """Number of tokens on which every latent is active."""
        active = (self.values > 0).to(self.values.dtype)
        return self.values.new_zeros(self.d_sae).index_add_(0, self.indices.flatten(), active.flatten())


def chunk_tokens(d_sae: int) -> int:
    """Tokens whose dense pre-activations fit the chunk budget."""
    return max(1, CHUNK_ELEMENTS // d_sae)


def select_top(
    x: Float[Tensor, "token d_in"], weight: Float[Tensor, "d_in d_sae"], bias: Float[Tensor, " d_sae"], k: int
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    """The k largest pre-activations x @ weight + bias of each token, chunk by chunk; unsorted.

    The product runs in the dtype of the arguments.
    """
    values, indices = [], []
    for chunk in torch.split(x, chunk_tokens(weight.shape[1])):
        top = torch.addmm(bias, chunk, weight).topk(k, dim=1, sorted=False)
        values.append(top.values)
        indices.append(top.indices)
    if not values:
        return x.new_zeros(0, k), torch.zeros(0, k, dtype=torch.long, device=x.device)
    return torch.cat(values), torch.cat(indices)


def pair_dots(
    x: Float[Tensor, "token d_in"], rows: Float[Tensor, "d_sae d_in"], indices: Int[Tensor, "token slot"]
) -> Float[Tensor, "token slot"]:
    """The dot product of each token with the rows of its latents: x[t] . rows[indices[t, s]]."""
    n_tokens, n_slots = indices.shape
    flat = indices.flatten()
    offsets = torch.arange(0, flat.numel(), n_slots, device=flat.device)
    bags = torch.arange(n_tokens, device=flat.device).repeat_interleave(n_slots)
    out: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), rows, flat, offsets, bags, 0, -1
    )
    return out.view(n_tokens, n_slots)


def combine(
    rows: Float[Tensor, "d_sae d_in"], indices: Int[Tensor, "token slot"], values: Float[Tensor, "token slot"]
) -> Float[Tensor, "token d_in"]:
    """Sum of rows weighted by values, per token: what a decoder does before its bias."""
    return torch.nn.functional.embedding_bag(indices, rows, per_sample_weights=values, mode="sum")


class TransposedPairs:
    """(token, latent) pairs sorted by latent, to sum tokens into latents: the products S^T @ dense.

    Args:
        indices: latent of each slot.
        d_sae: number of latents.
    """

    def __init__(self, indices: Int[Tensor, "token slot"], d_sae: int) -> None:
        self.n_tokens, self.n_slots = indices.shape
        self.d_sae = d_sae
        flat = indices.flatten()
        self.order = torch.argsort(flat)
        self.tokens = self.order // self.n_slots
        self.rows = torch.zeros(d_sae + 1, dtype=torch.long, device=flat.device)
        torch.cumsum(torch.bincount(flat, minlength=d_sae), 0, out=self.rows[1:])

    def sum_tokens(
        self, values: Float[Tensor, "token slot"], dense: Float[Tensor, "token d_in"]
    ) -> Float[Tensor, "d_sae d_in"]:
        """For every latent, the sum over its tokens of value times dense row."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
            matrix = torch.sparse_csr_tensor(
                self.rows,
                self.tokens,
                values.flatten()[self.order],
                (self.d_sae, self.n_tokens),
                check_invariants=False,
            )
            return matrix @ dense
