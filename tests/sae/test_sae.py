"""Encoding and decoding against the dense formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from saetools.errors import InputError
from saetools.sae import SAE, Gated, JumpReLU, ReLU, TopK, sparse

KINDS = ["topk", "relu", "jumprelu", "gated"]


def dense_latents(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    pre = (x - sae.b_dec * sae.apply_b_dec_to_input if sae.apply_b_dec_to_input else x) @ sae.W_enc
    match sae.nonlinearity:
        case TopK(k=k):
            pre = pre + sae.b_enc
            return pre.relu() * torch.zeros_like(pre).scatter_(1, pre.topk(k).indices, 1.0)
        case ReLU():
            return (pre + sae.b_enc).relu()
        case JumpReLU(threshold=threshold):
            return (pre + sae.b_enc).relu() * (pre + sae.b_enc > threshold)
        case Gated(r_mag=r_mag, b_mag=b_mag):
            return (pre * r_mag.exp() + b_mag).relu() * (pre + sae.b_enc > 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centred", [True, False])
def test_encode_and_decode_equal_the_dense_formulas(
    make_sae: Callable[..., SAE], monkeypatch: pytest.MonkeyPatch, kind: str, centred: bool
):
    monkeypatch.setattr(sparse, "CHUNK_ELEMENTS", 64 * 9)
    sae = make_sae(kind, apply_b_dec_to_input=centred)
    x = 3 * torch.randn(50, 16)
    latents, dense = sae.encode(x), dense_latents(sae, x)
    torch.testing.assert_close(latents.to_dense(), dense)
    torch.testing.assert_close(sae.decode(latents), dense @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(sae(x), dense @ sae.W_dec + sae.b_dec)
    assert sae(x.view(5, 10, 16)).shape == (5, 10, 16)
    assert torch.equal(latents.counts(), (dense > 0).sum(0).float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_a_transcoder_predicts_another_width(make_sae: Callable[..., SAE], kind: str, skip: bool):
    sae = make_sae(kind, d_out=5, apply_b_dec_to_input=False, skip=skip)
    x = torch.randn(20, 16)
    expected = dense_latents(sae, x) @ sae.W_dec + sae.b_dec + (x @ sae.W_skip.T if skip else 0)
    torch.testing.assert_close(sae(x.view(4, 5, 16)), expected.view(4, 5, 5))
    if skip:
        with pytest.raises(InputError, match="x: expected the input, for an SAE with a skip connection"):
            sae.decode(sae.encode(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm"])
def test_an_input_norm_is_undone(make_sae: Callable[..., SAE], kind: str, norm: str):
    sae, plain = make_sae(kind, input_norm=norm), make_sae(kind)
    x = 7 * torch.randn(20, 16) + 3
    if norm == "layer_norm":
        shift, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
    else:
        shift, scale = torch.zeros(20, 1), x.norm(dim=1, keepdim=True) / 4
    inner = (x - shift) / scale
    torch.testing.assert_close(sae.encode(x).to_dense(), plain.encode(inner).to_dense())
    torch.testing.assert_close(sae(x), plain(inner) * scale + shift)
    torch.testing.assert_close(sae.output_scale(x), scale)
    assert plain.output_scale(x) == 1
    with pytest.raises(InputError, match=r"x: expected the input, .* or an input norm"):
        sae.decode(sae.encode(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_encoded_like_its_tokens(make_sae: Callable[..., SAE], kind: str):
    sae, x = make_sae(kind), torch.randn(20, 16)
    together = sae.encode(x).to_dense()
    alone = torch.cat([sae.encode(x[i : i + 1]).to_dense() for i in range(20)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_without_active_latents(make_sae: Callable[..., SAE], kind: str):
    sae = make_sae(kind)
    sae.b_enc.fill_(-1000)
    x = torch.randn(6, 16)
    assert not sae.encode(x).values.any()
    assert torch.equal(sae(x), sae.b_dec.expand(6, 16))
    assert sae(torch.zeros(0, 16)).shape == (0, 16)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_no_dense_matrix_is_built(
    make_sae: Callable[..., SAE], largest_tensor: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, kind: str
):
    monkeypatch.setattr(sparse, "CHUNK_ELEMENTS", 1024 * 8)
    sae = make_sae(kind, d_sae=1024)
    if kind == "jumprelu":
        sae.nonlinearity.threshold.fill_(9.0)
    x = torch.randn(512, 16)
    with largest_tensor() as largest:
        sae(x)
    assert 1024 * 8 <= largest.n_entries <= 1024 * 16 < 512 * 1024  # a chunk, or the weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_faster_product_proposes_latents_and_exact_values_choose(make_sae: Callable[..., SAE], dtype: torch.dtype):
    sae = make_sae(d_in=64, d_sae=512, k=16)
    x = torch.randn(2000, 64)
    exact, fast = sae.encode(x), sae.encode(x, encode_dtype=dtype)
    active, fast_active = exact.to_dense() > 0, fast.to_dense() > 0
    assert (active & fast_active).sum() > 0.999 * active.sum()
    torch.testing.assert_close((fast.to_dense() * active), exact.to_dense() * fast_active)
    assert fast.indices.shape == exact.indices.shape
    assert sae.encode(x[:0], encode_dtype=dtype).values.shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_few_latents_are_all_proposed(make_sae: Callable[..., SAE], dtype: torch.dtype):
    sae, x = make_sae(d_sae=12, k=10), torch.randn(50, 16)
    torch.testing.assert_close(sae.encode(x, encode_dtype=dtype).to_dense(), sae.encode(x).to_dense())


def test_encode_dtypes_that_do_not_suit(make_sae: Callable[..., SAE]):
    x = torch.zeros(2, 16)
    with pytest.raises(InputError, match="encode_dtype: expected none for JumpReLU"):
        make_sae("jumprelu").encode(x, encode_dtype=torch.int8)
    with pytest.raises(InputError, match=r"torch\.float32 or torch\.bfloat16 or torch\.int8 for this SAE on cpu"):
        make_sae().encode(x, encode_dtype=torch.float16)
    with pytest.raises(InputError, match=r"expected torch\.bfloat16 for this SAE on cpu, received torch\.int8"):
        make_sae(dtype=torch.bfloat16).encode(x, encode_dtype=torch.int8)
    assert torch.equal(make_sae().encode(x, encode_dtype=torch.float32).indices, make_sae().encode(x).indices)


def test_bfloat16_weights(make_sae: Callable[..., SAE]):
    sae, x = make_sae("topk", dtype=torch.bfloat16), torch.randn(30, 16)
    assert sae.encode(x).values.dtype == sae(x).dtype == torch.bfloat16
    assert (sae(x) - make_sae("topk")(x)).norm() < 0.3 * x.norm()


def test_directions_have_length_one(make_sae: Callable[..., SAE]):
    sae = make_sae()
    sae.W_dec[3] = 0
    norms = sae.directions().norm(dim=1)
    torch.testing.assert_close(norms[torch.arange(64) != 3], torch.ones(63))
    assert norms[3] == 0


def test_wrong_shapes_and_k(make_sae: Callable[..., SAE]):
    sae = make_sae()
    with pytest.raises(InputError, match=r"\[token, 16\], received \(2, 17\).*blocks\.1\.hook_resid_post"):
        sae.encode(torch.zeros(2, 17))
    with pytest.raises(InputError, match="k: expected 1 or more"):
        TopK(0)
    with pytest.raises(InputError, match="at most d_sae = 8, received 9"):
        SAE(4, 8, TopK(9))


def test_settings_that_exclude_each_other():
    with pytest.raises(InputError, match="apply_b_dec_to_input: expected False where d_in = 4 and d_out = 3 differ"):
        SAE(4, 8, ReLU(), d_out=3)
    with pytest.raises(InputError, match="input_norm: expected none for a transcoder"):
        SAE(4, 8, ReLU(), input_norm="layer_norm", skip=True)
