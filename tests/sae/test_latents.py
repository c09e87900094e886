"""Statistics of latents over a corpus, against the dense matrix."""

from __future__ import annotations

from collections.abc import Callable

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
    assert got.median_norm == pytest.approx(float(acts.float().norm(dim=1).median()))
    assert got.rate[5] == got.mean[5] == got.p99[5] == 0
    for latent in range(64):
        active = dense[:, latent][dense[:, latent] > 0].numpy()
        if len(active):
            assert float(got.p99[latent]) == pytest.approx(np.quantile(active, 0.99, method="nearest"), rel=1e-5)


def test_latents_that_never_fire(make_sae: Callable[..., SAE]):
    sae = make_sae()
    sae.b_enc.fill_(-1000)
    got = measure_latents(sae, [block_of(torch.randn(5, 16))], SITE)
    assert not got.rate.any()
    assert not got.p99.any()


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
