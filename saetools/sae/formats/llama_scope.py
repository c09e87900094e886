"""Llama Scope's folder: `hyperparams.json` and `checkpoints/final.safetensors`, read only.

Two linear layers (`encoder.weight` [d_sae, d_model], `decoder.weight` [d_model, d_sae], a bias each) that were trained
on activations of mean norm sqrt(d_model). With s = sqrt(d_model) / mean norm, what comes in is multiplied by s and what
goes out divided by the s of the output; both are folded into the weights, so latents have the size that SAELens gives
them. The single jump threshold is in units of the unscaled stream: s folds into it too. Where training counted a latent
together with the norm of its decoder row (`sparsity_include_decoder_norm`), so does the threshold, as in Llama Scope's
own loader; SAELens 6.54 leaves that norm out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from saetools.errors import InputError
from saetools.sae.formats.files import Checkpoint, assemble, check_shapes, refuse_unknown
from saetools.sae.model import SAE, SAEMetadata
from saetools.sae.nonlinearity import JumpReLU, ReLU


def matches(checkpoint: Checkpoint) -> bool:
    """Whether keys are those of this format."""
    return (
        not {"encoder.weight", "decoder.weight"}.isdisjoint(checkpoint.names)
        and "d_model" in checkpoint.config
        and not checkpoint.config.keys().isdisjoint({"jump_relu_threshold", "dataset_average_activation_norm"})
    )


def load(checkpoint: Checkpoint) -> SAE:
    """Read an SAE or a transcoder.

    Raises:
        InputError: for settings that these SAEs do not have at inference.
        IntegrityError: if tensors are missing or have other shapes.
    """
    config, file = checkpoint.config, checkpoint.file
    _check_supported(config)
    d_in = int(config["d_model"])
    d_sae = int(config.get("d_sae") or d_in * int(config["expansion_factor"]))
    tensors = checkpoint.tensors()
    if config.get("use_decoder_bias") is False:
        tensors.setdefault("decoder.bias", torch.zeros(d_in))
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,)}
    shapes |= {"decoder.weight": (d_in, d_sae), "decoder.bias": (d_in,)}
    check_shapes(tensors, shapes, file)
    refuse_unknown(tensors, shapes, file)
    scale_in, scale_out = _scales(config, d_in)
    W_dec = tensors["decoder.weight"].T / scale_out
    jump = float(config.get("jump_relu_threshold", 0.0))
    threshold = torch.full((d_sae,), jump * scale_in, dtype=W_dec.dtype)
    if config.get("sparsity_include_decoder_norm"):
        threshold = jump / W_dec.norm(dim=1)
    site, site_out = config.get("hook_point_in") or "", config.get("hook_point_out") or ""
    return assemble(
        ReLU() if config.get("act_fn") == "relu" else JumpReLU(threshold),
        encoder=tensors["encoder.weight"] * scale_in,
        W_dec=W_dec,
        b_enc=tensors["encoder.bias"],
        b_dec=tensors["decoder.bias"] / scale_out,
        apply_b_dec_to_input=bool(config.get("apply_decoder_bias_to_pre_encoder")),
        metadata=SAEMetadata(site=site, site_out="" if site_out == site else site_out),
    )


def _check_supported(config: Mapping[str, Any]) -> None:
    # An SAE trained with top-k comes with the threshold that replaces it at inference.
    kind = config.get("act_fn", "jumprelu")
    kind = "jumprelu" if kind == "topk" and config.get("jump_relu_threshold", 0.0) > 0 else kind
    for setting, received, allowed in (
        ("act_fn", kind, ("jumprelu", "relu")),
        ("norm_activation", config.get("norm_activation", "dataset-wise"), ("dataset-wise", "inference")),
        ("use_glu_encoder", bool(config.get("use_glu_encoder")), (False,)),
    ):
        if received not in allowed:
            raise InputError(
                "path",
                expected=f"an SAE with {setting} " + " or ".join(map(str, allowed)),
                received=repr(received),
                remedy="pick an SAE of the published kind",
            )


def _scales(config: Mapping[str, Any], d_model: int) -> tuple[float, float]:
    """What training multiplied inputs and outputs by."""
    if config.get("norm_activation") == "inference":
        return 1.0, 1.0
    norms = config["dataset_average_activation_norm"]
    return math.sqrt(d_model) / norms["in"], math.sqrt(d_model) / norms.get("out", norms["in"])
