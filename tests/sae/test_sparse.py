"""The sparse products are those of the dense matrices they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saetools.sae import sparse
from saetools.sae.sparse import LatentMajorPairs, SparseLatents, combine, select_top, select_top_of_candidates


def random_latents(n_tokens: int = 40, n_slots: int = 5, d_sae: int = 23) -> tuple[SparseLatents, Tensor]:
    """Latents with padded slots, and the dense matrix."""
    dense = torch.rand(n_tokens, d_sae)
    dense[dense < 0.7] = 0
    dense[3] = 0
    top = dense.topk(n_slots, dim=1, sorted=False)
    dense = torch.zeros_like(dense).scatter_(1, top.indices, top.values)
    indices = torch.where(top.values > 0, top.indices, 0)  # padding may point at a latent that is active elsewhere
    return SparseLatents(indices, top.values, d_sae), dense


def test_sparse_latents_equal_their_dense_matrix():
    latents, dense = random_latents()
    wanted = torch.tensor([7, 0, 22, 3])
    assert len(latents) == 40
    assert torch.equal(latents.to_dense(), dense)
    assert torch.equal(latents.of(wanted), dense[:, wanted])
    assert latents.of(torch.tensor([], dtype=torch.long)).shape == (40, 0)
    assert torch.equal(latents.counts(), (dense > 0).sum(0).float())
    torch.testing.assert_close(latents.sums(), dense.sum(0))


def test_no_tokens_or_no_slots():
    none = SparseLatents(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3), 9)
    empty = SparseLatents(torch.zeros(4, 0, dtype=torch.long), torch.zeros(4, 0), 9)
    rows = torch.randn(9, 5)
    for latents in (none, empty):
        assert torch.equal(latents.to_dense(), torch.zeros(len(latents), 9))
        assert torch.equal(latents.of(torch.tensor([1])), torch.zeros(len(latents), 1))
        assert not latents.sums().any()
        assert not latents.counts().any()
        assert torch.equal(combine(rows, latents.indices, latents.values), torch.zeros(len(latents), 5))


@pytest.mark.parametrize(("d_sae", "k"), [(512, 2), (512, 8), (511, 2), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_select_top_is_topk(monkeypatch: pytest.MonkeyPatch, d_sae: int, k: int, dtype: torch.dtype):
    monkeypatch.setattr(sparse, "CHUNK_ELEMENTS", 7 * d_sae)
    x, weight, bias = torch.randn(30, 6).to(dtype), torch.randn(6, d_sae).to(dtype), torch.randn(d_sae).to(dtype)
    pre = torch.cat([torch.addmm(bias, chunk, weight) for chunk in x.split(7)])
    values, indices = select_top(x, weight, bias, k)
    assert torch.equal(values, pre.gather(1, indices))
    assert torch.equal(values.sort(1).values, pre.topk(k).values.sort(1).values)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_select_top_with_many_equal_values():
    bias = torch.tensor([1.0, 2.0]).repeat(256)
    values, indices = select_top(torch.zeros(3, 4), torch.zeros(4, 512), bias, 2)
    assert torch.equal(values, torch.full((3, 2), 2.0))
    assert bool((indices % 2 == 1).all())
    assert all(len(set(row)) == 2 for row in indices.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_by_latent(dtype: torch.dtype):
    n_tokens, d_sae, d_in, k = 50, 31, 6, 4
    indices = torch.rand(n_tokens, d_sae).topk(k).indices
    indices[indices == 5] = 6  # latent 5 has no token
    indices[:, :2] = torch.stack([torch.zeros(n_tokens), torch.full((n_tokens,), 9)], 1).long()
    values, x, rows = torch.randn(n_tokens, k, dtype=dtype), torch.randn(n_tokens, d_in, dtype=dtype), None
    rows = torch.randn(d_sae, d_in, dtype=dtype)
    pairs = LatentMajorPairs(indices, d_sae)
    assert torch.equal(pairs.scatter(pairs.gather(values)), values)
    torch.testing.assert_close(pairs.scatter(pairs.dots(rows, x)), (x @ rows.T).gather(1, indices))
    dense = torch.zeros(n_tokens, d_sae, dtype=dtype).scatter_add_(1, indices, values)
    out = torch.full((d_sae, d_in), torch.nan, dtype=dtype)
    assert pairs.sum_tokens(pairs.gather(values), x, out=out) is out
    torch.testing.assert_close(out, dense.T @ x)
    torch.testing.assert_close(pairs.sum_tokens(pairs.gather(values), x), dense.T @ x)
    torch.testing.assert_close(pairs.sums(pairs.gather(values)), dense.sum(0))
    torch.testing.assert_close(combine(rows, indices, values), dense @ rows)


@pytest.mark.parametrize("loudness", [0.0, 1e-3, 1e-2, 1.0, 100.0])
def test_one_token_of_another_size_does_not_spoil_the_candidates_of_others(loudness: float):
    generator = torch.Generator().manual_seed(0)
    x, rows = torch.randn(400, 64, generator=generator), torch.randn(512, 64, generator=generator)
    bias = 2 * torch.randn(512, generator=generator)
    x[0] *= loudness
    _, chosen = select_top_of_candidates(x, rows, bias, 16, n=24, dtype=torch.int8)
    top = (x @ rows.T + bias).topk(16, dim=1).indices
    found = (top[:, :, None] == chosen[:, None, :]).any(2)
    assert found[1:].float().mean() > 0.999
    assert found[0].float().mean() > 0.9


@pytest.mark.parametrize(("width", "k"), [(40, 8), (512, 40), (8192, 40), (8192, 600), (1001, 1001)])
@pytest.mark.parametrize("used_bits", [20, 30])
def test_rough_keys_may_lose_only_low_bits(width: int, k: int, used_bits: int):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**used_bits), 2**used_bits, (20, width), generator=generator, dtype=torch.int32)
    columns = sparse._top_columns(keys, k, spare_bits=31 - used_bits)
    assert all(len(set(row)) == k for row in columns.tolist())
    lost = max(0, 9 - (31 - used_bits))  # rows of up to 512 columns are numbered in 9 bits
    found, top = keys.gather(1, columns).amin(1), keys.topk(k, dim=1).values[:, -1]
    assert bool((found >= top - (1 << lost)).all())
    assert lost or torch.equal(found, top)
