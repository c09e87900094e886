"""The folder of dictionary_learning: `ae.pt`, a pickled state dict, and `config.json` with the trainer's settings.

`trainer.dict_class` names the class, and each class has names of its own for its weights. Linear layers store a decoder
of shape [d_in, d_sae]; `MatryoshkaBatchTopKSAE` and `JumpReluAutoEncoder` store it the other way round.
`AutoEncoderNew` and `JumpReluAutoEncoder` do not subtract the decoder's bias from the input. BatchTopK and Matryoshka
SAEs become `JumpReLU` with the one threshold that training learnt.

A file from the middle of a training run nests the state dict as `ae` beside `step`, `optimizer`, `config` and
`norm_factor`: training divided activations by that factor, and biases and threshold are multiplied by it only in the
final file. Here that is done on loading, so latents are in units of the residual stream.

Weights stay as they are stored. The library's own loader gives an `AutoEncoder` unit decoder rows unless told not to,
which multiplies its latents by the old norms. What the files have no place for lies beside, in `saetools.json`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetools.errors import InputError, IntegrityError, SaetoolsWarning
from saetools.provenance import write_json
from saetools.sae.formats.files import (
    BESIDE,
    Checkpoint,
    assemble,
    check_shapes,
    float_tensors,
    replace_file,
    to_store,
    width,
    write_beside,
)
from saetools.sae.model import SAE, SAEMetadata
from saetools.sae.nonlinearity import Gated, JumpReLU, Nonlinearity, ReLU, TopK

CONFIG, WEIGHTS = "config.json", "ae.pt"


@dataclass(frozen=True)
class _Class:
    """Names of weights in a class of the library."""

    b_enc: str = "encoder.bias"
    b_dec: str = "b_dec"
    encoder: str = "encoder.weight"
    decoder: str = "decoder.weight"
    others: tuple[str, ...] = ()
    centres: bool = True
    """Whether b_dec is subtracted from the input."""

    @property
    def names(self) -> set[str]:
        return {self.encoder, self.decoder, self.b_enc, self.b_dec, *self.others}


_CLASSES = {
    "AutoEncoder": _Class(b_dec="bias"),
    "AutoEncoderNew": _Class(b_dec="decoder.bias", centres=False),
    "GatedAutoEncoder": _Class("gate_bias", "decoder_bias", others=("mag_bias", "r_mag")),
    "AutoEncoderTopK": _Class(),
    "BatchTopKSAE": _Class(others=("threshold",)),
    "MatryoshkaBatchTopKSAE": _Class("b_enc", "b_dec", "W_enc", "W_dec", ("threshold", "group_sizes")),
    "JumpReluAutoEncoder": _Class("b_enc", "b_dec", "W_enc", "W_dec", ("threshold",), centres=False),
}
_BY_NAMES = ("MatryoshkaBatchTopKSAE", "GatedAutoEncoder", "AutoEncoder", "JumpReluAutoEncoder")
"""Classes that their weights alone tell apart; of two that match, the first."""


def matches(checkpoint: Checkpoint) -> bool:
    """Whether keys are those of this format."""
    trainer = checkpoint.config.get("trainer")
    if isinstance(trainer, Mapping) and "dict_class" in trainer:
        return not {"ae", "encoder.weight", "decoder.weight", "W_enc", "W_dec"}.isdisjoint(checkpoint.names)
    if checkpoint.config or checkpoint.file.suffix not in (".pt", ".pth"):
        return False
    return checkpoint.names >= {"ae", "optimizer"} or any(
        checkpoint.names >= spec.names - {"group_sizes", "threshold"} for spec in _CLASSES.values()
    )


def load(checkpoint: Checkpoint) -> SAE:
    """Read an SAE of any of the library's classes, finished or from the middle of a run.

    Raises:
        InputError: for another class, or if the class cannot be told.
        IntegrityError: if tensors are missing or have other shapes.
    """
    entries, file = checkpoint.entries(), checkpoint.file
    trainer, scale = dict(checkpoint.config.get("trainer") or {}), 1.0
    if "ae" in entries:
        trainer |= entries.get("config") or {}
        scale = float(entries.get("norm_factor") or 1.0)
        entries = entries["ae"]
    tensors = float_tensors(entries)
    class_name = _class_name(trainer.get("dict_class"), tensors, file)
    spec = _CLASSES[class_name]
    for key in (spec.b_enc, spec.b_dec, "mag_bias", "threshold"):
        if key in tensors:
            tensors[key] = tensors[key] * scale
    d_sae, d_in = width(tensors, spec.b_enc, file), width(tensors, spec.b_dec, file)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        {"mag_bias", "r_mag"} & set(spec.others) | ({"threshold"} if class_name == "JumpReluAutoEncoder" else set()),
        (d_sae,),
    )
    shapes[spec.encoder] = (d_in, d_sae) if spec.encoder == "W_enc" else (d_sae, d_in)
    shapes[spec.decoder] = (d_sae, d_in) if spec.decoder == "W_dec" else (d_in, d_sae)
    check_shapes(tensors, shapes, file)
    encoder, decoder = tensors[spec.encoder], tensors[spec.decoder]
    return assemble(
        _nonlinearity(class_name, trainer, tensors, file),
        encoder=encoder.T if spec.encoder == "W_enc" else encoder,
        W_dec=decoder if spec.decoder == "W_dec" else decoder.T,
        b_enc=tensors[spec.b_enc],
        b_dec=tensors[spec.b_dec],
        apply_b_dec_to_input=spec.centres,
        metadata=_metadata(trainer),
    )


def _class_name(given: str | None, tensors: Mapping[str, Tensor], file: Path) -> str:
    name = given or next((name for name in _BY_NAMES if _CLASSES[name].names <= tensors.keys()), None)
    if name in _CLASSES:
        return name
    raise InputError(
        "path",
        expected="a class of dictionary_learning: " + ", ".join(_CLASSES),
        received=f"{given!r} for {file}" if given else f"{file} without a config.json, whose weights fit several",
        remedy="put config.json with trainer.dict_class beside it" if given is None else "load one of these",
    )


def _nonlinearity(
    class_name: str, trainer: Mapping[str, Any], tensors: Mapping[str, Tensor], file: Path
) -> Nonlinearity:
    match class_name:
        case "GatedAutoEncoder":
            return Gated(tensors["r_mag"], tensors["mag_bias"])
        case "JumpReluAutoEncoder":
            return JumpReLU(tensors["threshold"])
        case "AutoEncoderTopK":
            return TopK(_k(trainer, tensors, file))
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            if "threshold" not in tensors or tensors["threshold"].numel() != 1:
                raise IntegrityError(f"threshold in {file}: expected one number, received none; train it with one")
            threshold = tensors["threshold"].reshape(1).expand(width(tensors, _CLASSES[class_name].b_enc, file))
            if bool(threshold[0] < 0):
                _warn_of_no_threshold(file)
            return JumpReLU(threshold.clamp_min(0.0))
        case _:
            return ReLU()


def _warn_of_no_threshold(file: Path) -> None:
    import warnings

    warnings.warn(
        f"{file} was saved before training learnt a threshold: every positive latent is active, many more than k",
        SaetoolsWarning,
        stacklevel=6,
    )


def _k(trainer: Mapping[str, Any], tensors: Mapping[str, Tensor], file: Path) -> int:
    stored = {int(value) for value in (tensors.get("k"), trainer.get("k")) if value is not None}
    if len(stored) != 1:
        raise IntegrityError(f"k for {file}: expected one number, received {sorted(stored)} from weights and config")
    return stored.pop()


def _metadata(trainer: Mapping[str, Any]) -> SAEMetadata:
    """Model and site from the trainer's settings; another submodule than the residual stream keeps its own name."""
    layer, submodule = trainer.get("layer"), trainer.get("submodule_name")
    is_residual = submodule is None or re.fullmatch(r"resid_post(_layer_\d+)?", str(submodule))
    site = f"blocks.{layer}.hook_resid_post" if is_residual and isinstance(layer, int) else str(submodule or "")
    plain = {key: value for key, value in trainer.items() if isinstance(value, str | int | float | list | None)}
    return SAEMetadata(
        model_name=str(trainer.get("lm_name") or ""),
        site=site,
        provenance={"dictionary_learning": plain} if plain else {},
    )


def save(sae: SAE, folder: Path, storage_dtype: torch.dtype | None) -> None:
    """Write an SAE; the config comes last, so a folder with a config is complete.

    Raises:
        InputError: for a kind that dictionary_learning does not have.
    """
    class_name, others = _describe(sae)
    folder.mkdir(parents=True, exist_ok=True)
    spec = _CLASSES[class_name]
    tensors = {
        spec.encoder: sae.W_enc if spec.encoder == "W_enc" else sae.encoder,
        spec.decoder: sae.W_dec if spec.decoder == "W_dec" else sae.W_dec.T,
        spec.b_enc: sae.b_enc,
        spec.b_dec: sae.b_dec,
    }
    for name in (CONFIG, BESIDE):
        (folder / name).unlink(missing_ok=True)
    stored = {key: to_store(tensor, storage_dtype) for key, tensor in tensors.items()}
    stored |= {key: to_store(tensor) for key, tensor in others.items()}
    replace_file(folder / WEIGHTS, lambda temporary: torch.save(stored, temporary))
    write_beside(sae, folder / WEIGHTS)
    layer = re.match(r"blocks\.(\d+)\.", sae.metadata.site)
    trainer = {
        "dict_class": class_name,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "layer": int(layer[1]) if layer else None,
        "lm_name": sae.metadata.model_name,
        "submodule_name": None if sae.metadata.site.endswith("hook_resid_post") else sae.metadata.site or None,
        **({"k": int(others["k"])} if "k" in others else {}),
    }
    write_json(folder / CONFIG, {"trainer": trainer})


def _describe(sae: SAE) -> tuple[str, dict[str, Tensor]]:
    """The class that is this kind of SAE, and its weights beyond those that all have."""
    kind, centres = sae.nonlinearity, sae.apply_b_dec_to_input
    if sae.d_out == sae.d_in and sae.W_skip is None and sae.input_norm == "none":
        match kind:
            case ReLU():
                return "AutoEncoder" if centres else "AutoEncoderNew", {}
            case Gated(r_mag=r_mag, b_mag=b_mag) if centres:
                return "GatedAutoEncoder", {"r_mag": r_mag, "mag_bias": b_mag}
            case TopK(k=k) if centres:
                return "AutoEncoderTopK", {"k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
            case JumpReLU(threshold=threshold) if not centres:
                return "JumpReluAutoEncoder", {"threshold": threshold}
            case JumpReLU(threshold=threshold) if bool((threshold == threshold[0]).all()) and (mean_k := _mean_k(sae)):
                return "BatchTopKSAE", {"k": torch.tensor(mean_k, dtype=torch.int), "threshold": threshold[0]}
            case _:
                pass
    raise InputError(
        "sae",
        expected="for dictionary_learning, an SAE without skip or input norm, d_out = d_in: ReLU; TopK or Gated that "
        "subtracts b_dec; JumpReLU that does not, or that does with one threshold and a known k in its provenance",
        received=f"{type(kind).__name__}, d_in {sae.d_in}, d_out {sae.d_out}, input norm {sae.input_norm}, "
        f"apply_b_dec_to_input={centres}, skip={sae.W_skip is not None}",
        remedy='save it with format="sae_lens"',
    )


def _mean_k(sae: SAE) -> int | None:
    """The mean number of active latents that a BatchTopK SAE was trained for, if its provenance tells."""
    for settings in (sae.metadata.provenance.get("dictionary_learning"), sae.metadata.provenance.get("train")):
        if isinstance(settings, Mapping) and isinstance(settings.get("k"), int):
            return int(settings["k"])
    return None
