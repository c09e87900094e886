"""OpenAI's single file: a pickled state dict with its settings inside, read only.

`pre_bias` is subtracted from the input and added to the output; `encoder.weight` [d_sae, d_in] with `latent_bias`,
`decoder.weight` [d_in, d_sae]. `activation` names the nonlinearity and `activation_state_dict` holds its k. A file with
TopK was trained on tokens of zero mean and unit deviation, which is undone after decoding. A tied decoder is stored as
`decoder.linear.weight`, the encoder's. Counts of how often latents fired are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saetools.errors import InputError
from saetools.sae.formats.files import Checkpoint, assemble, check_shapes, float_tensors, width
from saetools.sae.model import SAE
from saetools.sae.nonlinearity import ReLU, TopK

_KEYS = {"pre_bias", "latent_bias"}


def matches(checkpoint: Checkpoint) -> bool:
    """Whether keys are those of this format."""
    return checkpoint.names >= _KEYS and not checkpoint.config


def load(checkpoint: Checkpoint) -> SAE:
    """Read an SAE.

    Raises:
        InputError: for an activation that keeps negative values.
        IntegrityError: if tensors are missing or have other shapes.
    """
    entries, file = checkpoint.entries(), checkpoint.file
    tensors = float_tensors(entries)
    if "decoder.linear.weight" in tensors:
        tensors["decoder.weight"] = tensors["decoder.linear.weight"].T
    d_in, d_sae = width(tensors, "pre_bias", file), width(tensors, "latent_bias", file)
    check_shapes(tensors, {"encoder.weight": (d_sae, d_in), "decoder.weight": (d_in, d_sae)}, file)
    nonlinearity = _nonlinearity(entries)
    return assemble(
        nonlinearity,
        encoder=tensors["encoder.weight"],
        W_dec=tensors["decoder.weight"].T,
        b_enc=tensors["latent_bias"],
        b_dec=tensors["pre_bias"],
        apply_b_dec_to_input=True,
        input_norm="layer_norm" if isinstance(nonlinearity, TopK) else "none",
    )


def _nonlinearity(entries: Mapping[str, Any]) -> ReLU | TopK:
    name, settings = entries.get("activation", "ReLU"), entries.get("activation_state_dict") or {}
    after = settings.get("postact_fn", "ReLU")
    if name == "ReLU":
        return ReLU()
    if name == "TopK" and after == "ReLU" and "k" in settings:
        return TopK(int(settings["k"]))
    raise InputError(
        "path",
        expected="activation ReLU, or TopK with a k and postact_fn ReLU",
        received=f"{name} with {dict(settings)}",
        remedy="pick an SAE with one of these",
    )
