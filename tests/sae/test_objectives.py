"""Every kind of loss: gradients against autograd on the dense formula, and what each learns from planted features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import Planted
from torch import Tensor

from saetools.sae import (
    BatchTopKLoss,
    Gated,
    GatedLoss,
    JumpReLU,
    JumpReLULoss,
    MatryoshkaLoss,
    ReLU,
    StandardLoss,
    TrainConfig,
    load_sae,
    sparse,
    train_sae,
)
from saetools.sae.loss import batch_topk_step
from saetools.sae.objective import StepContext
from saetools.sae.sparse import select_batch_top
from saetools.sae.weights import GatedWeights, JumpReLUWeights, Weights, empty_like

NEVER = torch.zeros(96, dtype=torch.bool)


def context(step: int = 10_000, **buffers: float) -> StepContext:
    return StepContext(NEVER, torch.float32, step, {name: torch.tensor(value) for name, value in buffers.items()})


def assert_gradients(got: Weights, leaf: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, weight in leaf.items():
        error = (getattr(got, name) - weight.grad).norm() / weight.grad.norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


# Choosing the largest of a batch


@pytest.mark.parametrize("n_pairs", [1, 80, 320, 3000])
@pytest.mark.parametrize("shift", [0.0, -2.0, -100.0])
def test_the_largest_of_a_batch_are_chosen(monkeypatch: pytest.MonkeyPatch, n_pairs: int, shift: float):
    monkeypatch.setattr(sparse, "CHUNK_ELEMENTS", 96 * 11)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(80, 24, generator=generator), torch.randn(24, 96, generator=generator)
    x[3] *= 20  # a token with many of them
    bias = torch.full((96,), shift)
    dense = x @ weight + bias
    found = select_batch_top(x, weight, bias, n_pairs)
    values = dense.flatten().sort(descending=True).values[:n_pairs]
    expected = values[values > 0]
    torch.testing.assert_close(found.values.sort(descending=True).values, expected)
    torch.testing.assert_close(dense[found.tokens, found.latents], found.values)
    assert bool((found.tokens.diff() >= 0).all())


# Gradients


@pytest.mark.parametrize("encode_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [None, [12, 40, 96]])
def test_batch_topk_equals_autograd(
    make_weights: Callable[..., Weights],
    monkeypatch: pytest.MonkeyPatch,
    widths: list[int] | None,
    encode_dtype: torch.dtype,
):
    monkeypatch.setattr(sparse, "CHUNK_ELEMENTS", 96 * 11)
    weights, x = make_weights(24, 96), 2 * torch.randn(80, 24)
    weights.W_dec.mul_(torch.linspace(0.3, 3, 96)[torch.randperm(96), None])
    lengths = weights.W_dec.norm(dim=1)
    dead = torch.arange(96) % 4 == 1
    got = batch_topk_step(x, weights, 4, widths=widths, encode_dtype=encode_dtype, dead=dead, k_aux=3)
    leaf = {name: weight.clone().requires_grad_() for name, weight in vars(weights).items()}
    pre = (x - leaf["b_dec"]) @ leaf["encoder"].T + leaf["b_enc"]
    kept = torch.zeros(80, 96)
    if encode_dtype == torch.float32:
        kept[pre * lengths > (pre * lengths).flatten().topk(321).values[-1]] = 1
        assert kept.sum() == 320
    else:  # the rounded choice, whatever it was: pairs are found again by their exact values
        strength = (pre.detach() * lengths)[..., None]
        matches = (strength - got.strength[got.strength > 0]).abs().min(-1).values < 1e-5
        kept[matches & (pre.detach() > 0)] = 1
        assert abs(int(kept.sum()) - 320) < 8
    f = pre.relu() * kept
    losses = []
    for width in widths or [96]:
        error = x - (f[:, :width] @ leaf["W_dec"][:width] + leaf["b_dec"])
        losses.append(error.square().sum() / len(x))
    error = error.detach()
    again = (x - leaf["b_dec"].detach()) @ leaf["encoder"].T + leaf["b_enc"]
    chosen = torch.where(dead, again * lengths, -torch.inf).topk(3).indices
    aux = again.relu() * torch.zeros_like(again).scatter_(1, chosen, 1.0)
    share = (error - aux @ leaf["W_dec"]).square().sum() / error.square().sum()
    loss = sum(losses) / len(losses) + x.shape[1] * share / 32
    loss.backward()
    assert float(got.loss) == pytest.approx(loss.item(), rel=1e-5 if encode_dtype == torch.float32 else 1e-3)
    assert_gradients(got.grads, leaf, 1e-5 if encode_dtype == torch.float32 else 0.02)


def dense_losses(kind: str, x: Tensor, leaf: dict[str, Tensor]) -> Tensor:
    pre = (x - leaf["b_dec"]) @ leaf["encoder"].T
    norms = leaf["W_dec"].norm(dim=1)
    if kind == "standard":
        f = (pre + leaf["b_enc"]).relu()
        extra = 0.7 * (f * norms).sum()
    else:
        gate = (pre + leaf["b_enc"]).relu()
        f = (pre * leaf["r_mag"].exp() + leaf["b_mag"]).relu() * (gate > 0)
        by_gate = gate @ leaf["W_dec"].detach() + leaf["b_dec"].detach()
        extra = 0.7 * (gate * norms).sum() + (x - by_gate).square().sum()
    return ((x - f @ leaf["W_dec"] - leaf["b_dec"]).square().sum() + extra) / len(x)


@pytest.mark.parametrize("kind", ["standard", "gated"])
def test_dense_kinds_equal_autograd_on_the_whole_batch(
    make_weights: Callable[..., Weights], monkeypatch: pytest.MonkeyPatch, kind: str
):
    monkeypatch.setattr(sparse, "CHUNK_ELEMENTS", 96 * 11)
    weights, x = make_weights(24, 96), 2 * torch.randn(80, 24)
    loss: Any = StandardLoss(sparsity=0.7)
    if kind == "gated":
        loss = GatedLoss(sparsity=0.7)
        weights = GatedWeights(**vars(weights), r_mag=torch.linspace(-1, 1, 96), b_mag=torch.linspace(-1, 2, 96))
    grads = empty_like(weights)
    done = loss.step(x, weights, grads, context(sparsity=0.7))
    leaf = {name: weight.clone().requires_grad_() for name, weight in vars(weights).items()}
    expected = dense_losses(kind, x, leaf)
    expected.backward()
    assert float(done.loss) == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients(grads, leaf)
    half = loss.step(x, weights, grads, context(step=500, sparsity=0.7))
    assert float(half.loss) < float(done.loss)  # the sparsity loss has not warmed up


def test_jumprelu_gradients_are_the_papers(make_weights: Callable[..., Weights], monkeypatch: pytest.MonkeyPatch):
    """Equations 11 and 12 of arXiv 2407.14435, written out on the dense matrices."""
    monkeypatch.setattr(sparse, "CHUNK_ELEMENTS", 96 * 11)
    weights, x = make_weights(24, 96), 2 * torch.randn(80, 24)
    weights = JumpReLUWeights(**vars(weights), log_threshold=torch.linspace(-2, 0.5, 96))
    loss = JumpReLULoss(sparsity=0.7, bandwidth=0.4, pre_act_coefficient=0.3)
    dead = torch.arange(96) % 5 == 0
    grads, now = empty_like(weights), context(sparsity=0.7)
    now.dead = dead
    done = loss.step(x, weights, grads, now)
    pre = ((x - weights.b_dec) @ weights.encoder.T + weights.b_enc).relu()
    theta = weights.log_threshold.exp()
    f = pre * (pre > theta)
    error = x - (f @ weights.W_dec + weights.b_dec)
    norms = weights.W_dec.norm(dim=1)
    below = (theta - pre).relu() * dead
    expected = error.square().sum() + 0.7 * (pre > theta).sum() + 0.3 * (below * norms).sum()
    assert float(done.loss) == pytest.approx(expected.item() / 80, rel=1e-5)
    d_f = -2 * error @ weights.W_dec.T
    window = ((pre - theta).abs() < 0.2).float() / 0.4
    d_theta = -(theta * window * d_f).sum(0) - 0.7 * window.sum(0) + 0.3 * ((below > 0) * norms).sum(0)
    d_pre = (d_f * (pre > theta) - 0.3 * (below > 0) * norms) * (pre > 0)
    torch.testing.assert_close(grads.log_threshold, d_theta * theta / 80, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads.b_enc, d_pre.sum(0) / 80, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads.encoder, d_pre.T @ (x - weights.b_dec) / 80, rtol=1e-4, atol=1e-5)
    assert int(done.n_active) == int((pre > theta).sum())


def test_no_dense_matrix_is_built_for_batch_topk(
    make_weights: Callable[..., Weights], largest_tensor: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sparse, "CHUNK_ELEMENTS", 1024 * 8)
    weights, x = make_weights(16, 1024), torch.randn(512, 16)
    with largest_tensor() as largest:
        batch_topk_step(x, weights, 4, widths=[256, 1024])
    assert 1024 * 8 <= largest.n_entries <= 1024 * 64 < 512 * 1024


# What they learn


TARGET: dict[str, Any] = {"sparsity": 0.3, "target_l0": 3.5, "sparsity_warmup_steps": 500}
KINDS = {  # the largest FVU: L1 shrinks what it finds
    "batchtopk": (BatchTopKLoss(k=3, k_aux=16), JumpReLU, 3e-3, 0.1),
    "matryoshka": (MatryoshkaLoss(k=3, k_aux=16, shares=(0.5, 1.0)), JumpReLU, 3e-3, 0.15),
    "standard": (StandardLoss(**TARGET), ReLU, 3e-3, 0.6),
    "gated": (GatedLoss(**TARGET), Gated, 3e-3, 0.1),
    "jumprelu": (JumpReLULoss(**TARGET), JumpReLU, 1e-3, 0.2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_planted_features_are_found(tmp_path: Path, kind: str):
    loss, nonlinearity, lr, largest_fvu = KINDS[kind]
    config = TrainConfig(
        d_sae=72, loss=loss, n_tokens=2000 * 256, batch_size=256, lr=lr, warmup_steps=50, dead_after_tokens=20_000
    )
    source = Planted()
    sae = train_sae(source, config, tmp_path)
    assert isinstance(sae.nonlinearity, nonlinearity)
    x = source.draw(2000, seed=12345)
    assert (x - sae(x)).square().sum() < largest_fvu * (x - x.mean(0)).square().sum()
    assert 2 < float((sae.encode(x).values > 0).sum()) / 2000 < 5
    assert (source.directions @ sae.directions().T).max(1).values.mean() > 0.9
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(72))
    assert torch.equal(load_sae(tmp_path)(x), sae(x))
