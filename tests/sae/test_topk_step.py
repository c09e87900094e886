"""A sparse training step gives autograd's numbers for the dense formula at the same active latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saetools.sae import sparse
from saetools.sae.loss import topk_step
from saetools.sae.weights import Weights

K, K_AUX, COEFFICIENT = 4, 3, 0.5


def dense_step(x: Tensor, weights: Weights, indices: Tensor, dead: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients by autograd, with [token, d_sae] matrices."""
    leaf = {name: weight.clone().requires_grad_() for name, weight in vars(weights).items()}
    pre = (x - leaf["b_dec"]) @ leaf["encoder"].T + leaf["b_enc"]
    f = pre.relu() * torch.zeros_like(pre).scatter_(1, indices, 1.0)
    error = x - (f @ leaf["W_dec"] + leaf["b_dec"])
    loss = error.square().sum() / len(x)
    if dead is not None and dead.any():
        error = error.detach()
        pre = (x - leaf["b_dec"].detach()) @ leaf["encoder"].T + leaf["b_enc"]
        strength = pre * leaf["W_dec"].norm(dim=1)
        chosen = torch.where(dead, strength, -torch.inf).topk(min(K_AUX, int(dead.sum()))).indices
        f = pre.relu() * torch.zeros_like(pre).scatter_(1, chosen, 1.0)
        loss = loss + COEFFICIENT * x.shape[1] * (error - f @ leaf["W_dec"]).square().sum() / error.square().sum()
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in leaf.items()}


@pytest.mark.parametrize("with_dead", ["none", "some", "one"])
@pytest.mark.parametrize(
    ("dtype", "encode_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.float32, torch.bfloat16, 1e-5),
        (torch.float64, torch.float64, 1e-10),
        (torch.float64, torch.bfloat16, 1e-10),
        (torch.float32, torch.int8, 1e-5),
        (torch.float64, torch.int8, 1e-10),
    ],
)
def test_equals_autograd(
    make_weights: Callable[..., Weights],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    encode_dtype: torch.dtype,
    tolerance: float,
    with_dead: str,
):
    monkeypatch.setattr(sparse, "CHUNK_ELEMENTS", 96 * 11)
    weights, x = make_weights(24, 96, dtype=dtype), 2 * torch.randn(80, 24, dtype=dtype)
    weights.W_dec.mul_(torch.linspace(0.3, 3, 96, dtype=dtype)[torch.randperm(96), None])
    weights.b_enc[:20] -= 3  # so that some of the chosen latents are negative, and cut off
    dead = {"none": None, "some": torch.arange(96) % 4 == 1, "one": torch.arange(96) == 7}[with_dead]
    got = topk_step(x, weights, K, encode_dtype=encode_dtype, dead=dead, k_aux=K_AUX, aux_coefficient=COEFFICIENT)
    loss, grads = dense_step(x, weights, got.indices, dead)
    assert abs(got.loss - loss) < tolerance * loss
    for name, expected in grads.items():
        error = (getattr(got.grads, name) - expected).norm() / expected.norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def test_latents_are_chosen_as_if_decoder_rows_had_length_1(make_weights: Callable[..., Weights]):
    weights, x = make_weights(24, 96), torch.randn(80, 24)
    plain = topk_step(x, weights, K)
    lengths = torch.linspace(0.3, 3, 96)[torch.randperm(96)]
    other = topk_step(
        x,
        Weights(
            weights.encoder / lengths[:, None],
            weights.W_dec * lengths[:, None],
            weights.b_enc / lengths,
            weights.b_dec,
        ),
        K,
    )
    assert torch.equal(other.indices.sort(1).values, plain.indices.sort(1).values)
    torch.testing.assert_close(other.error, plain.error)


def test_negative_top_latents_are_cut_off(make_weights: Callable[..., Weights]):
    weights = make_weights(24, 96)
    weights.b_enc.fill_(-100)
    got = topk_step(torch.randn(8, 24), weights, K)
    assert not got.values.any()
    assert not got.grads.encoder.any()
    assert not got.grads.W_dec.any()


def test_gradients_go_to_the_tensors_given(make_weights: Callable[..., Weights]):
    weights, x = make_weights(24, 96), torch.randn(80, 24)
    buffers = Weights(*(torch.full_like(weight, torch.nan) for weight in vars(weights).values()))
    fresh, reused = topk_step(x, weights, K), topk_step(x, weights, K, grads=buffers)
    assert reused.grads is buffers
    for name in vars(weights):
        assert torch.equal(getattr(fresh.grads, name), getattr(buffers, name))


@pytest.mark.parametrize(("encode_dtype", "share"), [(torch.bfloat16, 0.97), (torch.int8, 0.99)])
@pytest.mark.parametrize("b_enc", [0.0, 1.0, 20.0])
def test_low_precision_chooses_nearly_the_same_latents_and_computes_them_exactly(
    make_weights: Callable[..., Weights], encode_dtype: torch.dtype, share: float, b_enc: float
):
    weights, x = make_weights(64, 1024), torch.randn(200, 64)
    x[:20] *= 5  # loud tokens must not cost the others their precision
    weights.b_enc.copy_(b_enc * torch.randn(1024))
    exact, rounded = topk_step(x, weights, 16), topk_step(x, weights, 16, encode_dtype=encode_dtype)
    dense = ((x - weights.b_dec) @ weights.encoder.T + weights.b_enc).relu()
    torch.testing.assert_close(rounded.values, dense.gather(1, rounded.indices), rtol=1e-5, atol=1e-5)
    shared = [len(set(a) & set(b)) for a, b in zip(exact.indices.tolist(), rounded.indices.tolist(), strict=True)]
    assert sum(shared) / (200 * 16) > share
    assert abs(rounded.loss / exact.loss - 1) < 0.01


@pytest.mark.parametrize("encode_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_no_dense_matrix_is_built(
    make_weights: Callable[..., Weights],
    largest_tensor: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    encode_dtype: torch.dtype,
):
    monkeypatch.setattr(sparse, "CHUNK_ELEMENTS", 1024 * 8)
    weights, x = make_weights(16, 1024), torch.randn(512, 16)
    dead = torch.arange(1024) % 2 == 0
    with largest_tensor() as largest:
        topk_step(x, weights, K, encode_dtype=encode_dtype, dead=dead, k_aux=K)
    assert 1024 * 8 <= largest.n_entries <= 1024 * 32 < 512 * 1024  # a chunk, or weights with the columns of a bias
