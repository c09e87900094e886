"""Latent activations kept sparse: a few (latent, value) pairs a token, and the products that training needs of them.

A [tokens, d_sae] matrix exists only for a bounded chunk of tokens, inside `select_top`. Decoding is an embedding bag.
For gradients the pairs are sorted by latent: then a dot product for every pair, and a sum over the tokens of every
latent, go through the weights once, row by row.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22  # entries of the dense pre-activations that exist at the same time,
_GPU_CHUNK_ELEMENTS = 1 << 26  # on a GPU, which small products leave idle,
LEAST_CHUNK_TOKENS = 256  # or more, where so few tokens would not pay for going through all weights
_GROUP = 4  # columns that `_top_columns` first looks at together
_INT8_MAX = 127
_SORTED_IN_REGISTERS = 512  # 32-bit integers, by numpy
_SUMMED_ROWS = 1024  # of gradients that are made at a time: fresh memory for all of them would cost more than they do
_CACHED_ROWS = 512  # that `_int8` rounds at a time
_BIAS_COLUMNS = 16  # of 8 bits, over which `_propose` spreads a bias: one would be too coarse and too small
_BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


@dataclass(frozen=True)
class SparseLatents:
    """Active latents of some tokens, padded with value 0 where a token has fewer.

    Args:
        indices: latent of each slot; no latent twice in a token, but for padding.
        values: its activation; 0 in padded slots. Negative ones exist only in an SAE with `AbsTopK`.
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
        # Latents that were not asked for go into a last column, which is cut off.
        column = torch.full((self.d_sae,), len(latents), dtype=torch.long, device=self.indices.device)
        column[latents] = torch.arange(len(latents), device=self.indices.device)
        out = self.values.new_zeros(len(self), len(latents) + 1)
        return out.scatter_add_(1, column[self.indices], self.values)[:, :-1]

    def sums(self) -> Float[Tensor, " d_sae"]:
        """Sum of every latent's activations over the tokens."""
        return self.values.new_zeros(self.d_sae).index_add_(0, self.indices.flatten(), self.values.flatten())

    def counts(self) -> Float[Tensor, " d_sae"]:
        """Number of tokens on which every latent is active."""
        active = (self.values != 0).to(self.values.dtype)
        return self.values.new_zeros(self.d_sae).index_add_(0, self.indices.flatten(), active.flatten())


def chunk_tokens(d_sae: int, device: torch.device) -> int:
    """Tokens whose dense pre-activations may exist at the same time."""
    elements = _GPU_CHUNK_ELEMENTS if device.type == "cuda" else CHUNK_ELEMENTS
    return max(LEAST_CHUNK_TOKENS, elements // d_sae)


def select_top(
    x: Float[Tensor, "token d_in"], weight: Float[Tensor, "d_in d_sae"], bias: Float[Tensor, " d_sae"], k: int
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    """The k largest pre-activations x @ weight + bias of each token, chunk by chunk; unsorted.

    Where fewer than k are positive, the rest are any others. The product runs in the dtype of the arguments.
    """
    values, indices = [], []
    for chunk in torch.split(x, chunk_tokens(weight.shape[1], x.device)):
        top = _top(torch.addmm(bias, chunk, weight), k)
        values.append(top[0])
        indices.append(top[1])
    if not values:
        return x.new_zeros(0, k), torch.zeros(0, k, dtype=torch.long, device=x.device)
    return torch.cat(values), torch.cat(indices)


def select_top_of_candidates(
    x: Float[Tensor, "token d_in"],
    rows: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    k: int,
    *,
    n: int,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    """The k largest of the n pre-activations of each token that a coarser product proposes; unsorted.

    Args:
        x: tokens.
        rows: of the encoder.
        bias: of the encoder.
        k: wanted.
        n: candidates a token, whose exact values choose; all latents if there are fewer.
        dtype: of the product: `int8`, or a floating one.
    """
    n = min(n, len(rows))
    if dtype == torch.int8:
        candidates = _propose(x, rows, bias, n)
    else:
        _, candidates = select_top(x.to(dtype), rows.to(dtype).T, bias.to(dtype), n)
    top = LatentMajorPairs(candidates, len(rows)).pre_activations(x, rows, bias).topk(k, dim=1, sorted=False)
    return top.values, candidates.gather(1, top.indices)


def _propose(x: Tensor, rows: Tensor, bias: Tensor, n: int) -> Tensor:
    """The latents with the n largest pre-activations of each token, as an 8-bit product sees them.

    Integer products take half the time of bfloat16 ones on CPUs that have instructions for them. Tokens are rounded
    with a scale each and weights with one for all, so that products of one token compare without being scaled back; the
    bias takes part in them as further columns. A few more candidates than wanted make up for the rounding.
    """
    tiny = torch.finfo(x.dtype).tiny
    row_unit = _largest(rows).clamp_min_(tiny) / _INT8_MAX
    # A token so quiet that the bias would not fit beside it is rounded coarser: to it the bias is nearly all.
    least = _largest(bias) / (row_unit * _INT8_MAX**2 * _BIAS_COLUMNS)
    loudest = torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True))
    token_unit = torch.maximum(loudest / _INT8_MAX, least).clamp_min_(tiny)
    # The bias in units of the quietest token; to a louder one, whose unit is larger, it is worth less. Columns round at
    # different points, so that their sum is finer than one of them.
    quietest = token_unit.min()
    offsets = (torch.arange(_BIAS_COLUMNS, device=x.device) + 0.5) / _BIAS_COLUMNS
    share = bias / (row_unit * quietest * _INT8_MAX * _BIAS_COLUMNS)
    worth = quietest / token_unit * _INT8_MAX
    tokens = _int8(x, token_unit, worth + offsets.flip(0))
    weight = _int8(rows, row_unit.expand(len(rows), 1), share[:, None] + offsets).T
    size = chunk_tokens(len(rows), x.device)
    pre = torch.empty(min(size, len(x)), len(rows), dtype=torch.int32, device=x.device)
    columns = torch.empty(len(x), n, dtype=torch.long, device=x.device)
    spare_bits = 31 - (_INT8_MAX**2 * len(weight)).bit_length()
    for some, out in zip(torch.split(tokens, size), torch.split(columns, size), strict=True):
        out.copy_(_top_columns(torch._int_mm(some, weight, out=pre[: len(some)]), n, spare_bits=spare_bits))
    return columns


def _largest(x: Tensor) -> Tensor:
    """The largest absolute value; `aminmax` goes through the entries once and makes no copy."""
    least, most = torch.aminmax(x)
    return torch.maximum(most, -least)


def _int8(x: Tensor, units: Tensor, columns: Tensor) -> Tensor:
    """x / units, rounded, and further columns, rounded down; some rows at a time, which stay in the cache."""
    n = x.shape[1]
    out = torch.empty(len(x), n + columns.shape[1], dtype=torch.int8, device=x.device)
    for place, part, unit in zip(*(torch.split(each, _CACHED_ROWS) for each in (out, x, units)), strict=True):
        place[:, :n] = (part / unit).round_()
    out[:, n:] = columns.floor_().clamp_(-_INT8_MAX, _INT8_MAX)
    return out


def _top(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns of the k largest entries of each row; where two are equal, either.

    Of entries below 0, which come only if fewer than k are positive, it may be any.
    """
    # The bits of positive floats are ordered as the floats are, and CPUs compare integers in two thirds of the time.
    columns = _top_columns(pre.view(_BITS[pre.dtype]), k)
    return pre.gather(1, columns), columns


def _top_columns(keys: Tensor, k: int, *, spare_bits: int = 0) -> Tensor:
    """Columns of the k largest entries of each row.

    `topk` alone takes a third of a training step's time, and on a GPU half as long again as this. The k largest entries
    lie in the k strided groups with the largest maxima, which are found in the same way. `spare_bits` are the high bits
    that no key uses; if there are any, the keys are rough, and may lose some low bits.
    """
    n_groups = keys.shape[1] // _GROUP
    if keys.shape[1] % _GROUP or n_groups < 4 * k:
        return _pick(keys, k, spare_bits)
    members = keys.view(-1, _GROUP, n_groups)
    groups = _top_columns(members.amax(1), k, spare_bits=spare_bits)
    top = _pick(members.gather(2, groups[:, None].expand(-1, _GROUP, -1)).flatten(1), k, spare_bits)
    return top // k * n_groups + groups.gather(1, top % k)


def _pick(keys: Tensor, k: int, spare_bits: int) -> Tensor:
    """The same for few columns."""
    n = keys.shape[1]
    if not spare_bits or not k < n <= _SORTED_IN_REGISTERS:
        return keys.topk(k, dim=1, sorted=False).indices
    # Numpy partitions short rows of integers several times faster, but has no fast way to tell where they were: that is
    # written into their low bits.
    low_bits = (1 << (n - 1).bit_length()) - 1
    packed = keys.bitwise_left_shift(spare_bits).bitwise_and_(~low_bits)
    packed |= torch.arange(n, dtype=keys.dtype)
    packed.numpy().partition(n - k, axis=1)
    return (packed[:, n - k :] & low_bits).long()


def combine(
    rows: Float[Tensor, "d_sae d_in"], indices: Int[Tensor, "token slot"], values: Float[Tensor, "token slot"]
) -> Float[Tensor, "token d_in"]:
    """Sum of rows weighted by values, per token: what a decoder does before its bias."""
    if not indices.shape[1]:
        return rows.new_zeros(len(indices), rows.shape[1])
    return torch.nn.functional.embedding_bag(indices, rows, per_sample_weights=values, mode="sum")


@dataclass(frozen=True)
class TokenMajorPairs:
    """Active (token, latent) pairs in the order of tokens, as many a token as it has.

    Args:
        tokens: of each pair, ascending.
        latents: of each pair; a token has no latent twice.
        values: pre-activation or activation of each pair.
        n_tokens: tokens in all.
    """

    tokens: Int[Tensor, " pair"]
    latents: Int[Tensor, " pair"]
    values: Float[Tensor, " pair"]
    n_tokens: int

    def __getitem__(self, chosen: Tensor) -> TokenMajorPairs:
        """Some of the pairs."""
        return TokenMajorPairs(self.tokens[chosen], self.latents[chosen], self.values[chosen], self.n_tokens)

    def combine(self, rows: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "token d_in"]:
        """Sum of rows weighted by values, per token."""
        counts = torch.bincount(self.tokens, minlength=self.n_tokens)
        starts = counts.cumsum(0) - counts
        return torch.nn.functional.embedding_bag(self.latents, rows, starts, per_sample_weights=self.values, mode="sum")


def select_batch_top(
    x: Float[Tensor, "token d_in"], weight: Float[Tensor, "d_in d_sae"], bias: Float[Tensor, " d_sae"], n_pairs: int
) -> TokenMajorPairs:
    """The `n_pairs` largest pre-activations of the whole batch, of those above 0; chunk by chunk.

    All entries above some lower bound are gathered, then the largest of these are kept; the bound is lowered until
    there are enough. A few tokens of the batch tell where to begin.
    """
    sample = torch.addmm(bias, x[:: max(1, len(x) // 64)][:64], weight).flatten()
    share = n_pairs / (len(x) * weight.shape[1])
    bound = 0.8 * float(sample.topk(max(1, round(share * len(sample)))).values[-1])
    while True:
        found = _entries_above(x, weight, bias, max(bound, 0.0))
        if len(found.values) >= n_pairs or bound <= 0:
            break
        bound = bound / 2 if bound > 1e-6 else 0.0
    if len(found.values) <= n_pairs:
        return found
    return found[found.values.topk(n_pairs, sorted=False).indices.sort().values]


def _entries_above(x: Tensor, weight: Tensor, bias: Tensor, bound: float) -> TokenMajorPairs:
    tokens, latents, values = [], [], []
    size = chunk_tokens(weight.shape[1], x.device)
    for number, chunk in enumerate(torch.split(x, size)):
        pre = torch.addmm(bias, chunk, weight)
        rows, columns = (pre > bound).nonzero(as_tuple=True)
        tokens.append(rows + number * size)
        latents.append(columns)
        values.append(pre[rows, columns])
    return TokenMajorPairs(torch.cat(tokens), torch.cat(latents), torch.cat(values), len(x))


class LatentMajorPairs:
    """(token, latent) pairs sorted by latent: a compressed sparse [d_sae, token] matrix without its values.

    Args:
        indices: latent of each slot, one row a token; or of each pair, where `tokens` are given. A token has no latent
            twice.
        d_sae: number of latents.
        tokens: token of each pair.
        n_tokens: tokens in all, where `tokens` are given.
    """

    def __init__(
        self,
        indices: Int[Tensor, "*slot"],
        d_sae: int,
        *,
        tokens: Int[Tensor, " pair"] | None = None,
        n_tokens: int | None = None,
    ) -> None:
        self.shape = indices.shape
        self.n_tokens = len(indices) if n_tokens is None else n_tokens
        self.d_sae = d_sae
        # 32 bits are what the sparse kernels use; they would convert wider ones in each product.
        self.latents, self.order = indices.flatten().int().sort()
        self.tokens = (self.order // indices.shape[1] if tokens is None else tokens[self.order]).int()
        self.starts = torch.zeros(d_sae + 1, dtype=torch.int32, device=indices.device)
        torch.cumsum(torch.bincount(self.latents, minlength=d_sae), 0, dtype=torch.int32, out=self.starts[1:])

    def gather(self, slots: Float[Tensor, "*slot"]) -> Float[Tensor, " pair"]:
        """Bring values of slots into the order of the pairs."""
        return slots.flatten()[self.order]

    def scatter(self, pairs: Float[Tensor, " pair"]) -> Float[Tensor, "*slot"]:
        """Bring values of pairs back into slots."""
        return torch.empty_like(pairs).index_copy_(0, self.order, pairs).view(self.shape)

    def dots(self, rows: Float[Tensor, "d_sae d_in"], x: Float[Tensor, "token d_in"]) -> Float[Tensor, " pair"]:
        """The dot product of each pair: the row of its latent with its token."""
        pattern = self._matrix(x.new_zeros(len(self.order)))
        products: Tensor = torch.sparse.sampled_addmm(pattern, rows, x.T, beta=0.0).values()
        return products

    def pre_activations(
        self, x: Float[Tensor, "token d_in"], rows: Float[Tensor, "d_sae d_in"], bias: Float[Tensor, " d_sae"]
    ) -> Float[Tensor, "*slot"]:
        """Those of the slots, in the dtype of the weights."""
        return self.scatter(self.dots(rows, x) + bias[self.latents])

    def sum_tokens(
        self,
        pairs: Float[Tensor, " pair"],
        x: Float[Tensor, "token d_in"],
        *,
        out: Float[Tensor, "d_sae d_in"] | None = None,
    ) -> Float[Tensor, "d_sae d_in"]:
        """For every latent, the sum over its tokens of value times x; written to `out` if given."""
        out = x.new_empty(self.d_sae, x.shape[1]) if out is None else out
        size = max(1, self.d_sae) if x.device.type == "cuda" else _SUMMED_ROWS  # a GPU has fast memory enough
        edges = [*self.starts[:-1:size].tolist(), len(pairs)]
        for number, rows in enumerate(torch.split(out, size)):
            first, last = edges[number : number + 2]
            starts = self.starts[number * size :][: len(rows)] - first
            weights = pairs[first:last]
            bags = self.tokens[first:last], x, starts
            rows.copy_(torch.nn.functional.embedding_bag(*bags, per_sample_weights=weights, mode="sum"))
        return out

    def sums(self, pairs: Float[Tensor, " pair"]) -> Float[Tensor, " d_sae"]:
        """For every latent, the sum of its values."""
        return pairs.new_zeros(self.d_sae).index_add_(0, self.latents, pairs)

    def _matrix(self, pairs: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
            return torch.sparse_csr_tensor(
                self.starts, self.tokens, pairs, (self.d_sae, self.n_tokens), check_invariants=False
            )
