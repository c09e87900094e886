"""Statistics of latents over a corpus, against the dense matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from saetools.activations import ActivationBlock
from saetools.errors import InputError
from saetools.latents import measure_latents, with_statistics
from saetools.models import Site
from saetools.sae import SAE

SITE = Site(1)


def block_of(acts: torch.Tensor) -> ActivationBlock:
    n = len(acts)
    zeros = torch.zeros(n, dtype=torch.long)
    return ActivationBlock({SITE: acts}, zeros, torch.ones(n, dtype=torch.uint8), zeros, torch.arange(n))


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_those_of_the_dense_matrix(make_sae: Callable[..., SAE], kind: str, dtype: torch.dtype):
    sae = make_sae(kind)
    sae.b_enc[5] = -1000  # never fires
    acts = (2 * torch.randn(700, 16)).to(dtype)
    got = measure_latents(sae, map(block_of, acts.split([300, 1, 399])), SITE)
    dense = sae.encode(acts).to_dense()
    assert got.n_tokens == 700
    torch.testing.assert_close(got.rate, (dense > 0).float().mean(0))
    torch.testing.assert_close(got.mean, dense.mean(0))
    torch.testing.assert_close(got.max, dense.amax(0))
    assert got.median_norm == pytest.approx(float(acts.float().norm(dim=1).median()))
    assert got.rate[5] == got.mean[5] == got.p99[5] == 0
    for latent in range(64):
        active = dense[:, latent][dense[:, latent] > 0].numpy()
        if len(active):
            assert float(got.p99[latent]) == pytest.approx(np.quantile(active, 0.99, method="nearest"), rel=0.016)


def test_percentiles_while_activations_grow_over_the_stream(make_sae: Callable[..., SAE]):
    sae, acts = make_sae("relu"), torch.randn(20_000, 16)
    acts *= torch.logspace(-2, 1, len(acts))[:, None]
    growing, shrinking = (measure_latents(sae, map(block_of, some.split(500)), SITE) for some in (acts, acts.flip(0)))
    for name in ("rate", "max", "p99"):
        assert torch.equal(getattr(growing, name), getattr(shrinking, name))
    expected = np.nanquantile(
        np.where(sae.encode(acts).to_dense() > 0, sae.encode(acts).to_dense(), np.nan), 0.99, axis=0
    )
    np.testing.assert_allclose(growing.p99, expected, rtol=0.02)


def test_signs_do_not_count_for_sizes(make_sae: Callable[..., SAE]):
    sae, acts = make_sae("abstopk"), torch.randn(300, 16)
    dense = sae.encode(acts).to_dense()
    got = measure_latents(sae, [block_of(acts)], SITE)
    torch.testing.assert_close(got.max, dense.abs().amax(0))
    torch.testing.assert_close(got.mean, dense.mean(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_faster_product_gives_nearly_the_same_statistics(make_sae: Callable[..., SAE], dtype: torch.dtype):
    sae, acts = make_sae(d_in=64, d_sae=512, k=16), torch.randn(2000, 64)
    exact, fast = (
        measure_latents(sae, [block_of(acts)], SITE, encode_dtype=encode_dtype) for encode_dtype in (None, dtype)
    )
    torch.testing.assert_close(fast.mean, exact.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fast.rate, exact.rate, rtol=0, atol=2e-3)


def test_memory_does_not_grow_with_tokens(make_sae: Callable[..., SAE], largest_tensor: Callable[[], Any]):
    sae = make_sae(d_in=16, d_sae=64)
    with largest_tensor() as few:
        measure_latents(sae, (block_of(torch.randn(4096, 16)) for _ in range(1)), SITE)
    with largest_tensor() as many:
        measure_latents(sae, (block_of(torch.randn(4096, 16)) for _ in range(9)), SITE)
    assert many.n_entries == few.n_entries


def test_latents_that_never_fire(make_sae: Callable[..., SAE]):
    sae = make_sae()
    sae.b_enc.fill_(-1000)
    got = measure_latents(sae, [block_of(torch.randn(5, 16))], SITE)
    assert not torch.stack([got.rate, got.mean, got.max, got.p99]).any()


def test_no_tokens(make_sae: Callable[..., SAE]):
    for blocks in ([], [block_of(torch.zeros(0, 16))]):
        with pytest.raises(InputError, match="blocks: expected at least one token"):
            measure_latents(make_sae(), blocks, SITE)


def test_with_statistics_shares_the_weights(make_sae: Callable[..., SAE]):
    sae, x = make_sae("jumprelu"), torch.randn(9, 16)
    statistics = measure_latents(sae, [block_of(x)], SITE)
    twin = with_statistics(sae, statistics)
    assert sae.p99 is None
    assert torch.equal(twin.p99, statistics.p99)
    assert twin.metadata.median_norm == statistics.median_norm
    assert twin.W_dec is sae.W_dec
    assert torch.equal(twin(x), sae(x))
