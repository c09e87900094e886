"""How much of a crosscoder's latents each model really has: latent scaling, in closed form from streamed sums.

A decoder row of length 0 says that a model lacks a latent. It may say so wrongly: the row was shrunk although the model
has the feature (complete shrinkage), or other latents write the same into this model (latent decoupling). So the
latent's contribution to the second model, f_j d_j, is fitted to what stands in each model m, by the beta that minimises
sum_t |beta f_j(t) d_j - y_t|^2, with y either what latents other than j leave of the activations (error), or what all
latents reconstruct (recon); Minder et al., arXiv 2504.02922.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.errors import InputError, NonFiniteError
from saetools.sae.crosscoder import Crosscoder
from saetools.sae.sparse import CHUNK_ELEMENTS, chunk_tokens


@dataclass(frozen=True)
class LatentScaling:
    """Sums over tokens, per latent of a crosscoder of two models; d_j is the row of the second one.

    Args:
        beta_error: of y = activations of model m minus the contributions of all other latents and the bias; NaN for a
            latent that never fires or has no d_j.
        beta_recon: of y = the contributions of all latents; the bias, which is there on every token, left out.
        n_active: tokens on which it is active.
        mean: mean activation over all tokens.
        n_tokens: tokens read.
        acts_sha256: hash of the activations that were read, in their order.
    """

    beta_error: Float[Tensor, "2 d_sae"]
    beta_recon: Float[Tensor, "2 d_sae"]
    n_active: Int[Tensor, " d_sae"]
    mean: Float[Tensor, " d_sae"]
    n_tokens: int
    acts_sha256: str


@torch.no_grad()
def scale_latents(crosscoder: Crosscoder, batches: Iterable[Float[Tensor, "_ 2 d_model"]]) -> LatentScaling:
    """Fit every latent to both models' errors and reconstructions.

    Memory is some numbers a latent, beside those of a chunk of tokens.

    Args:
        crosscoder: of two models.
        batches: activations of both on the same tokens, such as `PairedActivations([...]).at(site).epoch_batches(...)`.

    Raises:
        InputError: for a crosscoder of other than two models, or no tokens.
        NonFiniteError: if an activation is NaN or infinite.
    """
    if len(crosscoder.models) != 2:
        raise InputError(
            "crosscoder",
            expected="one of two models",
            received=", ".join(crosscoder.models),
            remedy="train one on base and tuned",
        )
    sae = crosscoder.sae
    base, tuned = crosscoder.decoders.double()
    device, d_sae = sae.W_dec.device, sae.d_sae
    fits = torch.zeros(4, d_sae, dtype=torch.double, device=device)  # of errors, then of reconstructions
    sums, squares, n_active = torch.zeros(3, d_sae, dtype=torch.double, device=device)
    n_tokens, digest = 0, hashlib.sha256()
    for batch in batches:
        digest.update(batch.contiguous().cpu().view(torch.uint8).numpy().tobytes())
        for acts in torch.split(batch.to(device, sae.W_dec.dtype), chunk_tokens(d_sae, device)):
            if not bool(torch.isfinite(acts).all()):
                raise NonFiniteError("activations of the models are not finite; read them in float32 or bfloat16")
            latents = crosscoder.encode(acts)
            recon = crosscoder.decode(latents)
            wrote = recon - sae.b_dec.view(2, -1)
            targets = torch.cat([acts - recon, wrote], dim=1)
            n_tokens += len(acts)
            sums += latents.sums()
            squares.index_add_(0, latents.indices.flatten(), latents.values.double().square().flatten())
            n_active += latents.counts()
            size = max(1, CHUNK_ELEMENTS // max(1, latents.indices.shape[1] * crosscoder.d_model))
            parts = (torch.split(each, size) for each in (targets, latents.indices, latents.values))
            for y, indices, values in zip(*parts, strict=True):
                dots = torch.einsum("tmd,tsd->mts", y, crosscoder.decoders[1][indices])
                fits.index_add_(1, indices.flatten(), (dots * values).flatten(1).double())
    if not n_tokens:
        raise InputError("batches", expected="at least one token", received="none", remedy="pass activations")
    lengths = tuned.square().sum(1)
    betas = fits / (squares * lengths)  # NaN where it never fires, or has no row
    # Without latent j, the error has what j wrote.
    own = torch.stack([(base * tuned).sum(1), lengths]) / lengths
    return LatentScaling(
        beta_error=(betas[:2] + own).cpu(),
        beta_recon=betas[2:].cpu(),
        n_active=n_active.long().cpu(),
        mean=(sums / n_tokens).cpu(),
        n_tokens=n_tokens,
        acts_sha256=digest.hexdigest(),
    )
