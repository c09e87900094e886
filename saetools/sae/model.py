"""The sparse autoencoder: weights, encoding to sparse latents, decoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saetools.errors import InputError
from saetools.sae.nonlinearity import AbsTopK, Gated, JumpReLU, Nonlinearity, ReLU, TopK
from saetools.sae.sparse import SparseLatents, combine

InputNorm = Literal["none", "layer_norm", "constant_norm"]
_EPS = 1e-5  # added to the standard deviation in `layer_norm`, as SAELens and OpenAI do


@dataclass(frozen=True)
class SAEMetadata:
    """What an SAE was trained on and what its units are; saved with the weights."""

    model_name: str = ""
    """The language model."""
    site: str = ""
    """The site in TransformerLens' terms, such as `blocks.15.hook_resid_post`."""
    median_norm: float | None = None
    """Median residual norm at the site on the base model, first positions left out: the unit of steering strength."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Training settings, data, figures."""
    site_out: str = ""
    """The site that a transcoder predicts; empty for an autoencoder, which predicts its own input."""


class SAE(nn.Module):
    """A sparse autoencoder on residual activations: f = nonlinearity((x - b_dec) W_enc + b_enc), x' = f W_dec + b_dec.

    Calling it reconstructs. Weights are in units of the unscaled residual stream. A transcoder is an SAE whose output
    is another site's; it may add a linear map of its input (`skip`).

    Args:
        d_in: width of the input.
        d_sae: number of latents.
        nonlinearity: `TopK`, `ReLU`, `JumpReLU`, `Gated`, `AbsTopK` or `MatchingPursuit`.
        d_out: width of the output; that of the input by default.
        apply_b_dec_to_input: subtract `b_dec` before encoding.
        input_norm: what is done to each token before encoding and undone after decoding: `none`; `layer_norm`: zero
            mean and unit deviation; `constant_norm`: norm sqrt(d_in).
        skip: whether W_skip x is added to the output, W_skip of shape [d_out, d_in].
        metadata: what it was trained on.
        dtype: of the weights.
        device: of the weights.

    Raises:
        InputError: for settings that exclude each other.

    Example:
        >>> sae = SAE(4, 16, TopK(2))
        >>> sae(torch.randn(3, 4)).shape, sae.encode(torch.randn(3, 4)).indices.shape
        (torch.Size([3, 4]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        nonlinearity: Nonlinearity,
        *,
        d_out: int | None = None,
        apply_b_dec_to_input: bool = True,
        input_norm: InputNorm = "none",
        skip: bool = False,
        metadata: SAEMetadata = SAEMetadata(),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        d_out = d_in if d_out is None else d_out
        _check(d_in, d_sae, d_out, nonlinearity, apply_b_dec_to_input, input_norm, skip)
        self.encoder = nn.Parameter(torch.zeros(d_sae, d_in, dtype=dtype, device=device))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_out, dtype=dtype, device=device))
        self.b_enc = nn.Parameter(torch.zeros(d_sae, dtype=dtype, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_out, dtype=dtype, device=device))
        self.W_skip = nn.Parameter(torch.zeros(d_out, d_in, dtype=dtype, device=device)) if skip else None
        self.nonlinearity = nonlinearity
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.input_norm = input_norm
        self.metadata = metadata
        self.register_buffer("p99", None)

    p99: Float[Tensor, " d_sae"] | None
    """99th percentile of each latent's activation where it is active, on the reference corpus, if it was measured."""

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self.encoder.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[0]

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # noqa: N802 - the field's name for it
        """Encoder weights (a view; they are kept as one row per latent)."""
        return self.encoder.T

    def encode(self, x: Float[Tensor, "token d_in"], *, encode_dtype: torch.dtype | None = None) -> SparseLatents:
        """Active latents of tokens, in units of the residual stream; no dense [token, d_sae] matrix is built.

        Inputs are cast to the SAE's dtype. No gradients flow.

        Args:
            x: activations.
            encode_dtype: for `TopK` in float32, a faster dtype for the product that proposes latents; the values, which
                then choose among them, are computed in float32 in any case. `torch.bfloat16` takes half the time, and
                `torch.int8`, on CPUs only, 0.4. With the shipped SAE the former chose the same latents and the latter
                all but 8 in a million.

        Raises:
            InputError: if the width is not the SAE's, or `encode_dtype` does not suit it.
        """
        with torch.no_grad():
            centred = self._centred(x)
            if encode_dtype is None:
                values, indices = self.nonlinearity.select(centred, self.encoder.T, self.b_enc)
            else:
                topk = self._checked_for(encode_dtype)
                values, indices = topk.select(centred, self.encoder.T, self.b_enc, encode_dtype=encode_dtype)
        return SparseLatents(indices, values, self.d_sae)

    @torch.no_grad()
    def encode_some(
        self, x: Float[Tensor, "token d_in"], latents: Int[Tensor, " latent"]
    ) -> Float[Tensor, "token latent"]:
        """Activations of some latents, as `encode` gives them up to rounding; inactive ones are 0.

        `ReLU`, `JumpReLU` and `Gated` latents do not depend on one another: only those asked for are computed.

        Args:
            x: activations.
            latents: which; none twice.

        Raises:
            InputError: if the width is not the SAE's.
        """
        if not isinstance(self.nonlinearity, ReLU | JumpReLU | Gated):
            return self.encode(x).of(latents)
        strength, active = self.nonlinearity.fire(
            self._centred(x), self.encoder[latents].T, self.b_enc[latents], latents
        )
        return torch.where(active, strength, 0.0)

    def decode(
        self, latents: SparseLatents, x: Float[Tensor, "token d_in"] | None = None
    ) -> Float[Tensor, "token d_out"]:
        """Reconstruction from sparse latents.

        Args:
            latents: what `encode` returned, or an edited version.
            x: the input, which an SAE with a skip connection or an input norm needs.

        Raises:
            InputError: if `x` is needed and missing.
        """
        recon = combine(self.W_dec, latents.indices, latents.values) + self.b_dec
        if self.W_skip is None and self.input_norm == "none":
            return recon
        if x is None:
            raise InputError(
                "x",
                expected="the input, for an SAE with a skip connection or an input norm",
                received="none",
                remedy="call decode(latents, x)",
            )
        x = x.to(self.W_dec.dtype)
        if self.W_skip is not None:
            return recon + x @ self.W_skip.T
        shift, scale = self._shift_and_scale(x)
        return recon * scale + shift

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Reconstruct activations of any leading shape; the result has the SAE's dtype."""
        tokens = x.reshape(-1, x.shape[-1])
        return self.decode(self.encode(tokens), tokens).view(*x.shape[:-1], self.d_out)

    def output_scale(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token 1"] | float:
        """What a decoder row is multiplied by in the output, per token: 1 without an input norm."""
        return 1.0 if self.input_norm == "none" else self._shift_and_scale(x.to(self.W_dec.dtype))[1]

    def directions(self) -> Float[Tensor, "d_sae d_out"]:
        """Decoder rows, each of length 1 (zero rows stay zero)."""
        return nn.functional.normalize(self.W_dec.detach(), dim=1)

    def _centred(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_in"]:
        """What the encoder's weights are applied to."""
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise InputError(
                "x",
                expected=f"activations of shape [token, {self.d_in}]",
                received=tuple(x.shape),
                remedy="flatten batch and position, and read the site this SAE was trained on "
                + (f"({self.metadata.site})" if self.metadata.site else ""),
            )
        x = x.to(self.W_dec.dtype)
        if self.input_norm != "none":
            shift, scale = self._shift_and_scale(x)
            x = (x - shift) / scale
        return x - self.b_dec if self.apply_b_dec_to_input else x

    def _checked_for(self, encode_dtype: torch.dtype) -> TopK:
        """The nonlinearity, if it can choose latents by a product of that dtype."""
        if not isinstance(self.nonlinearity, TopK):
            raise InputError(
                "encode_dtype",
                expected=f"none for {type(self.nonlinearity).__name__}: every one of its pre-activations is needed",
                received=encode_dtype,
                remedy="leave it out",
            )
        able = [self.W_dec.dtype]
        if self.W_dec.dtype in (torch.float32, torch.float64):
            able += [torch.bfloat16, torch.int8][: 2 if self.encoder.device.type == "cpu" else 1]
        if encode_dtype not in able:
            raise InputError(
                "encode_dtype",
                expected=" or ".join(map(str, able)) + f" for this SAE on {self.encoder.device.type}",
                received=encode_dtype,
                remedy="pick one of these",
            )
        return self.nonlinearity

    def _shift_and_scale(self, x: Tensor) -> tuple[Tensor | float, Tensor]:
        """What is subtracted from each token and what it is then divided by."""
        if self.input_norm == "constant_norm":
            return 0.0, torch.linalg.vector_norm(x, dim=-1, keepdim=True) / self.d_in**0.5
        return x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + _EPS


def _check(
    d_in: int,
    d_sae: int,
    d_out: int,
    nonlinearity: Nonlinearity,
    apply_b_dec_to_input: bool,
    input_norm: str,
    skip: bool,
) -> None:
    if isinstance(nonlinearity, TopK | AbsTopK) and nonlinearity.k > d_sae:
        raise InputError("k", expected=f"at most d_sae = {d_sae}", received=nonlinearity.k, remedy="lower k")
    if apply_b_dec_to_input and d_out != d_in:
        raise InputError(
            "apply_b_dec_to_input",
            expected=f"False where d_in = {d_in} and d_out = {d_out} differ",
            received=True,
            remedy="pass apply_b_dec_to_input=False",
        )
    if input_norm not in get_args(InputNorm):
        raise InputError(
            "input_norm",
            expected="one of " + ", ".join(get_args(InputNorm)),
            received=repr(input_norm),
            remedy="pick one of these",
        )
    if input_norm != "none" and (skip or d_out != d_in):
        raise InputError(
            "input_norm", expected="none for a transcoder", received=repr(input_norm), remedy="leave it out"
        )
