"""Sparsify's folder, one per hookpoint: `cfg.json` and `sae.safetensors`.

The encoder is a linear layer (`encoder.weight` [d_sae, d_in], `encoder.bias`); `W_dec` has a row per latent too. A
transcoder (`transcode` in the config) does not subtract `b_dec`; `W_skip` is a linear map of the input. The hookpoint
is the folder's name; the model is in the config of the run, one folder up. What sparsify has no place for lies beside,
in `saetools.json`. Configs of the time when it could keep latents by absolute value (`signed`) are understood.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from saetools.errors import InputError
from saetools.provenance import write_json
from saetools.sae.formats.files import (
    BESIDE,
    Checkpoint,
    assemble,
    check_shapes,
    read_config,
    refuse_unknown,
    write_beside,
    write_safetensors,
)
from saetools.sae.model import SAE, SAEMetadata
from saetools.sae.nonlinearity import AbsTopK, TopK

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def matches(checkpoint: Checkpoint) -> bool:
    """Whether keys are those of this format."""
    config = checkpoint.config
    return (
        not {"encoder.weight", "W_dec"}.isdisjoint(checkpoint.names)
        and {"d_in", "k"} <= config.keys()
        and config.keys().isdisjoint({"d_sae", "architecture"})
    )


def load(checkpoint: Checkpoint) -> SAE:
    """Read an SAE or a transcoder.

    Raises:
        InputError: for another activation function than top-k.
        IntegrityError: if tensors are missing or have other shapes.
    """
    config, file = checkpoint.config, checkpoint.file
    if config.get("activation", "topk") != "topk":
        raise InputError(
            "path",
            expected="an SAE with activation topk",
            received=f"{config['activation']!r} in {checkpoint.config_file}",
            remedy="train one with topk",
        )
    d_in = int(config["d_in"])
    d_sae = int(config.get("num_latents") or 0) or d_in * int(config["expansion_factor"])
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if config.get("skip_connection"):
        shapes["W_skip"] = (d_in, d_in)
    tensors = checkpoint.tensors()
    check_shapes(tensors, shapes, file)
    refuse_unknown(tensors, shapes, file)
    return assemble(
        AbsTopK(int(config["k"])) if config.get("signed") else TopK(int(config["k"])),
        encoder=tensors["encoder.weight"],
        W_dec=tensors["W_dec"],
        b_enc=tensors["encoder.bias"],
        b_dec=tensors["b_dec"],
        W_skip=tensors.get("W_skip"),
        apply_b_dec_to_input=not config.get("transcode"),
        metadata=_metadata(file, transcodes=bool(config.get("transcode"))),
    )


def _metadata(file: Path, *, transcodes: bool) -> SAEMetadata:
    """What the folders say: their names are part of the format."""
    hookpoint, run = file.parent.name, file.parent.parent / "config.json"
    model = read_config(run).get("model") if run.is_file() else None
    layer = re.fullmatch(r"layers\.(\d+)", hookpoint)
    if transcodes or layer is None:  # sparsify's own name: what a module's output is depends on the model
        site = hookpoint if re.fullmatch(r"layers\.\d+(\..+)?", hookpoint) else ""
    else:
        site = f"blocks.{layer[1]}.hook_resid_post"
    return SAEMetadata(model_name=model if isinstance(model, str) else "", site=site)


def save(sae: SAE, folder: Path, storage_dtype: torch.dtype | None) -> None:
    """Write an SAE; the config comes last, so a folder with a config is complete.

    Raises:
        InputError: for a kind that sparsify does not have.
    """
    config = _describe(sae)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, BESIDE):
        (folder / name).unlink(missing_ok=True)
    tensors = {"encoder.weight": sae.encoder, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip
    write_safetensors(folder / WEIGHTS, tensors, storage_dtype)
    write_beside(sae, folder / WEIGHTS)
    write_json(folder / CONFIG, config)


def _describe(sae: SAE) -> dict[str, Any]:
    kind = sae.nonlinearity
    if not isinstance(kind, TopK) or sae.d_out != sae.d_in or sae.input_norm != "none":
        raise InputError(
            "sae",
            expected="for sparsify, a TopK SAE with d_out = d_in and no input norm",
            received=f"{type(kind).__name__}, d_in {sae.d_in}, d_out {sae.d_out}, input norm {sae.input_norm}",
            remedy='save it with format="sae_lens"',
        )
    return {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": False,
        "num_latents": sae.d_sae,
        "k": kind.k,
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": not sae.apply_b_dec_to_input,
        "d_in": sae.d_in,
    }
