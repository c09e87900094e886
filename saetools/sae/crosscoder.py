"""One dictionary for several models: latents that all share, and latents that only some have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.errors import InputError
from saetools.sae.config import Progress, TrainConfig
from saetools.sae.io import load_sae
from saetools.sae.model import SAE, SAEMetadata
from saetools.sae.objective import BatchTopKLoss, TopKLoss
from saetools.sae.sparse import SparseLatents
from saetools.sae.train import ActivationSource, train_sae


@dataclass(frozen=True)
class Crosscoder:
    """An SAE on the activations of several models at once: one set of latents, a decoder per model.

    f = nonlinearity(sum_m (x_m - b_dec_m) W_enc_m + b_enc) and x'_m = f W_dec_m + b_dec_m (Lindsey et al., Sparse
    Crosscoders, 2024; with BatchTopK: arXiv 2504.02922). It is an SAE whose input is the models' activations one after
    the other. Decoder rows of all models together have length 1, so that a latent counts as much whether one model
    has it or all.

    Args:
        sae: with d_in = models x d_model.
        models: their names, in the order of the input.
    """

    sae: SAE
    models: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.models) < 2 or self.sae.d_in % len(self.models):
            raise InputError(
                "models",
                expected=f"two or more, which divide the SAE's width {self.sae.d_in}",
                received=len(self.models),
                remedy="name each model once, in the order of the input",
            )

    @property
    def d_model(self) -> int:
        """Width of one model."""
        return self.sae.d_in // len(self.models)

    @property
    def decoders(self) -> Float[Tensor, "model d_sae d_model"]:
        """Decoder rows of each model, in units of its residual stream."""
        return self.sae.W_dec.view(self.sae.d_sae, len(self.models), -1).transpose(0, 1)

    def encode(self, acts: Float[Tensor, "token model d_model"]) -> SparseLatents:
        """Active latents of tokens that all models have read.

        Raises:
            InputError: for another number of models or another width.
        """
        if acts.ndim != 3 or acts.shape[1:] != (len(self.models), self.d_model):
            raise InputError(
                "acts",
                expected=f"[token, {len(self.models)} models, {self.d_model}]",
                received=tuple(acts.shape),
                remedy="stack the models' activations of the same tokens",
            )
        return self.sae.encode(acts.flatten(1))

    def decode(self, latents: SparseLatents) -> Float[Tensor, "token model d_model"]:
        """Reconstruction of every model's activations."""
        return self.sae.decode(latents).view(len(latents), len(self.models), -1)

    def decoder_norms(self) -> Float[Tensor, "model d_sae"]:
        """Lengths of decoder rows."""
        norms: Tensor = torch.linalg.vector_norm(self.decoders, dim=2)
        return norms

    def relative_norms(self) -> Float[Tensor, "model d_sae"]:
        """Each model's share of a latent's decoder lengths.

        With two models, 0.5 means that both have the latent alike; near 1, that only this one has it.
        """
        norms = self.decoder_norms()
        return norms / norms.sum(0)


def train_crosscoder(
    source: ActivationSource,
    models: Sequence[str],
    config: TrainConfig,
    out: str | Path,
    *,
    metadata: SAEMetadata = SAEMetadata(),
    on_progress: Callable[[Progress], None] | None = None,
    device: torch.device | str = "cpu",
) -> Crosscoder:
    """Train a crosscoder, as `train_sae` trains an SAE; each model's activations are scaled by themselves.

    Args:
        source: activations [token, model, d_model], such as `PairedActivations([base, tuned]).at(site)`.
        models: names of the models, in that order.
        config: settings; the loss has to be one that ends in thresholds, such as `BatchTopKLoss`.
        out: folder.
        metadata: as for `train_sae`.
        on_progress: as for `train_sae`.
        device: as for `train_sae`.

    Raises:
        InputError: for `TopKLoss`, whose choice would depend on the units of the models, and as `train_sae`.

    Example:
        >>> import tempfile
        >>> from saetools.activations import PairedActivations, StreamedActivations
        >>> texts = list(tokenize([Conversation(text=pair.neutral) for pair in load_voices()[:4]], lm.tokenizer))
        >>> both = PairedActivations([StreamedActivations(view, [Site(1)], texts) for view in (lm, lm)])
        >>> config = TrainConfig(d_sae=64, loss=BatchTopKLoss(k=4), batch_size=64, n_tokens=640)
        >>> train_crosscoder(both.at(Site(1)), ["base", "tuned"], config, tempfile.mkdtemp()).decoders.shape
        torch.Size([2, 64, 576])
    """
    if isinstance(config.loss, TopKLoss) and not isinstance(config.loss, BatchTopKLoss):
        raise InputError(
            "config.loss", expected="BatchTopKLoss or another with thresholds", received="TopKLoss", remedy="change it"
        )
    provenance = {**metadata.provenance, "crosscoder": {"models": list(models)}}
    metadata = dataclasses.replace(metadata, provenance=provenance)
    sae = train_sae(source, config, out, metadata=metadata, on_progress=on_progress, device=device)
    return Crosscoder(sae, tuple(models))


def load_crosscoder(path: str | Path) -> Crosscoder:
    """Read what `train_crosscoder` wrote.

    Raises:
        InputError: if the folder holds an SAE that is no crosscoder, or none.
        IntegrityError: if it is damaged.
    """
    sae = load_sae(path)
    try:
        models = sae.metadata.provenance["crosscoder"]["models"]
    except (KeyError, TypeError):
        raise InputError("path", expected="a crosscoder", received=f"an SAE in {path}", remedy="use load_sae") from None
    return Crosscoder(sae, tuple(models))
