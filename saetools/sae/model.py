"""The sparse autoencoder: weights, encoding to sparse latents, decoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saetools.errors import InputError
from saetools.sae.nonlinearity import JumpReLU, TopK
from saetools.sae.sparse import SparseLatents, combine


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


class SAE(nn.Module):
    """A sparse autoencoder on residual activations: f = nonlinearity((x - b_dec) W_enc + b_enc), x' = f W_dec + b_dec.

    Calling it reconstructs. Weights are in units of the unscaled residual stream.

    Args:
        d_in: width of the residual stream.
        d_sae: number of latents.
        nonlinearity: `TopK` or `JumpReLU`.
        apply_b_dec_to_input: subtract `b_dec` before encoding.
        metadata: what it was trained on.
        dtype: of the weights.
        device: of the weights.

    Example:
        >>> sae = SAE(4, 16, TopK(2))
        >>> sae(torch.randn(3, 4)).shape, sae.encode(torch.randn(3, 4)).indices.shape
        (torch.Size([3, 4]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        nonlinearity: TopK | JumpReLU,
        *,
        apply_b_dec_to_input: bool = True,
        metadata: SAEMetadata = SAEMetadata(),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if isinstance(nonlinearity, TopK) and nonlinearity.k > d_sae:
            raise InputError("k", expected=f"at most d_sae = {d_sae}", received=nonlinearity.k, remedy="lower k")
        self.encoder = nn.Parameter(torch.zeros(d_sae, d_in, dtype=dtype, device=device))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in, dtype=dtype, device=device))
        self.b_enc = nn.Parameter(torch.zeros(d_sae, dtype=dtype, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_in, dtype=dtype, device=device))
        self.nonlinearity = nonlinearity
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.metadata = metadata
        self.register_buffer("p99", None)

    p99: Float[Tensor, " d_sae"] | None
    """99th percentile of each latent's activation where it is active, on the reference corpus, if it was measured."""

    @property
    def d_in(self) -> int:
        """Width of the residual stream."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[0]

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # noqa: N802 - the field's name for it
        """Encoder weights (a view; they are kept as one row per latent)."""
        return self.encoder.T

    def encode(self, x: Float[Tensor, "token d_in"]) -> SparseLatents:
        """Active latents of tokens, in units of the residual stream; no dense [token, d_sae] matrix is built.

        Inputs are cast to the SAE's dtype. No gradients flow.

        Raises:
            InputError: if the width is not the SAE's.
        """
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise InputError(
                "x",
                expected=f"activations of shape [token, {self.d_in}]",
                received=tuple(x.shape),
                remedy="flatten batch and position, and read the site this SAE was trained on "
                + (f"({self.metadata.site})" if self.metadata.site else ""),
            )
        with torch.no_grad():
            x = x.to(self.W_dec.dtype)
            centred = x - self.b_dec if self.apply_b_dec_to_input else x
            values, indices = self.nonlinearity.select(centred, self.encoder.T, self.b_enc)
        return SparseLatents(indices, values, self.d_sae)

    def decode(self, latents: SparseLatents) -> Float[Tensor, "token d_in"]:
        """Reconstruction from sparse latents."""
        return combine(self.W_dec, latents.indices, latents.values) + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruct activations of any leading shape; the result has the SAE's dtype."""
        return self.decode(self.encode(x.reshape(-1, x.shape[-1]))).view(x.shape)

    def directions(self) -> Float[Tensor, "d_sae d_in"]:
        """Decoder rows, each of length 1 (zero rows stay zero)."""
        return nn.functional.normalize(self.W_dec.detach(), dim=1)
