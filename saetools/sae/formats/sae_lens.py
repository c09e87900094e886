"""SAELens' folder: `cfg.json` and `sae_weights.safetensors`. It is our own format too, with what SAELens ignores.

Beside the weights lie our 99th percentiles; `metadata.saetools` of the config holds our metadata and the hash of the
weights. BatchTopK and Matryoshka SAEs are stored as `jumprelu`, as SAELens does. Configs from before SAELens 6 are
understood as SAELens 6 understands them.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetools.errors import InputError, IntegrityError, SaetoolsWarning
from saetools.provenance import sha256_of_file, write_json
from saetools.sae.formats.files import (
    Checkpoint,
    assemble,
    check_shapes,
    known_metadata,
    read_statistics,
    refuse_unknown,
    write_safetensors,
    write_statistics,
)
from saetools.sae.model import SAE, SAEMetadata
from saetools.sae.nonlinearity import AbsTopK, Gated, JumpReLU, MatchingPursuit, ReLU, TopK

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_NORMS = {"none": "none", "layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}
_TRANSCODERS = {
    "transcoder": False,
    "skip_transcoder": True,
    "jumprelu_transcoder": False,
    "jumprelu_skip_transcoder": True,
}
_ARCHITECTURES = ("topk", "standard", "jumprelu", "gated", "abstopk", "matching_pursuit", *_TRANSCODERS)


def matches(checkpoint: Checkpoint) -> bool:
    """Whether keys are those of this format; under SAELens' own file names some may be missing."""
    if checkpoint.config_file and (checkpoint.file.name, checkpoint.config_file.name) == (WEIGHTS, CONFIG):
        return True
    return "W_dec" in checkpoint.names and {"d_in", "d_sae"} <= checkpoint.config.keys()


def save(sae: SAE, folder: Path, storage_dtype: torch.dtype | None) -> None:
    """Write an SAE; the config comes last, so a folder with a config is complete."""
    architecture, tensors = _describe(sae)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    write_safetensors(folder / WEIGHTS, tensors, storage_dtype)
    write_statistics(sae, folder)
    metadata = sae.metadata
    config = {
        **architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": _NORMS[sae.input_norm],
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": version("sae-lens"),
            "model_name": metadata.model_name,
            "hook_name": metadata.site,
            **({"hook_name_out": metadata.site_out} if metadata.site_out else {}),
            "saetools": {**dataclasses.asdict(metadata), "weights_sha256": sha256_of_file(folder / WEIGHTS)},
        },
    }
    write_json(folder / CONFIG, config)


def _describe(sae: SAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """SAELens' name and settings of this kind of SAE, and its tensors under SAELens' names."""
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    kind = sae.nonlinearity
    is_transcoder = sae.d_out != sae.d_in or sae.W_skip is not None or bool(sae.metadata.site_out)
    if is_transcoder:
        if not isinstance(kind, ReLU | JumpReLU) or sae.apply_b_dec_to_input:
            raise InputError(
                "sae",
                expected="for SAELens, a ReLU or JumpReLU transcoder that leaves b_dec out of its input",
                received=f"a transcoder with {type(kind).__name__}, apply_b_dec_to_input={sae.apply_b_dec_to_input}",
                remedy='save a TopK transcoder with format="sparsify"; no format has the others',
            )
        name = ("jumprelu_" if isinstance(kind, JumpReLU) else "") + ("skip_" if sae.W_skip is not None else "")
        settings: dict[str, Any] = {"architecture": name + "transcoder", "d_out": sae.d_out}
        if sae.W_skip is not None:
            tensors["W_skip"] = sae.W_skip
        if isinstance(kind, JumpReLU):
            tensors["threshold"] = kind.threshold
        return settings, tensors
    match kind:
        case TopK(k=k):
            settings = {"architecture": "topk", "k": k, "rescale_acts_by_decoder_norm": False}
        case AbsTopK(k=k):
            settings = {"architecture": "abstopk", "k": k, "rescale_acts_by_decoder_norm": False}
        case ReLU():
            settings = {"architecture": "standard"}
        case JumpReLU(threshold=threshold):
            settings = {"architecture": "jumprelu"}
            tensors["threshold"] = threshold
        case Gated(r_mag=r_mag, b_mag=b_mag):
            settings = {"architecture": "gated"}
            tensors |= {"b_gate": tensors.pop("b_enc"), "r_mag": r_mag, "b_mag": b_mag}
        case MatchingPursuit():
            settings = {
                "architecture": "matching_pursuit",
                "residual_threshold": kind.residual_threshold,
                "max_iterations": kind.max_steps,
                "stop_on_duplicate_support": kind.stop_on_repeat,
            }
            if not sae.apply_b_dec_to_input and bool(sae.b_dec.any()):
                raise InputError(
                    "sae",
                    expected="for SAELens, a matching-pursuit SAE that subtracts the b_dec it adds",
                    received="apply_b_dec_to_input=False with a b_dec that is not 0",
                    remedy="set b_dec to 0; no format has this",
                )
            tensors = {"W_dec": sae.W_dec, "b_dec": sae.b_dec}
    return settings, tensors


def load(checkpoint: Checkpoint) -> SAE:
    """Read an SAE of any of SAELens' architectures that encode tokens one by one.

    Raises:
        InputError: for a temporal SAE, or settings that cannot be applied at run time.
        IntegrityError: if tensors are missing, or the weights are not those the config was written with.
    """
    file = checkpoint.file
    config = _modernise(checkpoint.config)
    ours = (config.get("metadata") or {}).get("saetools")
    if ours and ours["weights_sha256"] != sha256_of_file(file):
        raise IntegrityError(f"{file} is not the file that {CONFIG} was written with; save it again")
    _check_supported(config, str(file.parent))
    sae = _build(config, checkpoint.tensors(), file)
    sae.metadata = known_metadata(ours) if ours else _metadata(config)
    read_statistics(sae, file.parent)
    return sae


def from_sae_lens(theirs: Any, name: str) -> SAE:
    """An SAE of SAELens', in memory, as one of ours; it shares the weights where it can.

    Args:
        theirs: a `sae_lens.SAE`.
        name: what messages call it.

    Raises:
        InputError: as `load` does.
    """
    config = theirs.cfg.to_dict()
    _check_supported(config, name)
    tensors = {key: tensor.detach() for key, tensor in theirs.state_dict().items()}
    sae = _build(config, tensors, Path(name))
    sae.metadata = _metadata(config)
    return sae


def _modernise(config: Mapping[str, Any]) -> dict[str, Any]:
    """What SAELens 6 makes of a config, also one that was written before version 6."""
    metadata = config.get("metadata") or {}
    if int(str(config.get("sae_lens_version") or metadata.get("sae_lens_version") or 0).split(".")[0]) >= 6:
        return dict(config)
    modern = {"architecture": "standard", "normalize_activations": "none", **config}
    if isinstance(modern["normalize_activations"], bool):
        modern["normalize_activations"] = "expected_average_only_in" if modern["normalize_activations"] else "none"
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if activation == "topk":
        modern |= {"architecture": "topk", "k": config["activation_fn_kwargs"]["k"]}
    elif activation != "relu":
        modern["architecture"] = f"standard with {activation}"
    hook = config.get("hook_name", config.get("hook_point"))
    modern.setdefault("reshape_activations", "hook_z" if "hook_z" in str(hook) else "none")
    modern["metadata"] = {"model_name": config.get("model_name"), "hook_name": hook, **metadata}
    return modern


def _check_supported(config: Mapping[str, Any], name: str) -> None:
    if config.get("architecture") not in _ARCHITECTURES:
        raise InputError(
            "path",
            expected="an SAE of architecture " + ", ".join(_ARCHITECTURES),
            received=f"{config.get('architecture')!r} in {name}",
            remedy="load one of these architectures; others encode whole contexts, not tokens",
        )
    if config.get("reshape_activations") not in ("none", None):
        raise InputError(
            "path",
            expected="reshape_activations of none",
            received=repr(config["reshape_activations"]),
            remedy="use an SAE of a residual-stream site",
        )
    norm = config.get("normalize_activations")
    if norm == "expected_average_only_in":
        warnings.warn(
            f"{name} was trained on activations scaled to a mean norm of sqrt(d_in). SAELens folds that scale into "
            "the weights when it saves and then says so; this config does not. If latents are far too strong, it was "
            "not folded: scale the inputs",
            SaetoolsWarning,
            stacklevel=5,
        )
    elif norm not in (None, *_NORMS.values()):
        raise InputError(
            "path",
            expected="normalize_activations one of " + ", ".join(_NORMS.values()),
            received=repr(norm),
            remedy="fold it into the weights first",
        )


def _build(config: Mapping[str, Any], tensors: dict[str, Tensor], file: Path) -> SAE:
    d_in, d_sae, d_out = int(config["d_in"]), int(config["d_sae"]), int(config.get("d_out") or config["d_in"])
    name = config["architecture"]
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,)}
    if name.startswith("jumprelu"):
        shapes["threshold"] = (d_sae,)
    elif name == "gated":
        del shapes["b_enc"]
        shapes |= dict.fromkeys(("b_gate", "r_mag", "b_mag"), (d_sae,))
    elif name == "matching_pursuit":
        shapes = {"W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    if _TRANSCODERS.get(name):
        shapes["W_skip"] = (d_out, d_in)
    check_shapes(tensors, shapes, file)
    if bool((tensors.get("scaling_factor", torch.ones(1)) == 1).all()):
        tensors.pop("scaling_factor", None)  # SAELens once wrote ones, and ignores them
    refuse_unknown(tensors, shapes, file)
    W_dec, b_dec, centres = tensors["W_dec"], tensors["b_dec"], bool(config.get("apply_b_dec_to_input", True))
    if name == "matching_pursuit":  # tied; what is not subtracted is not added either
        tensors |= {"W_enc": W_dec.T, "b_enc": W_dec.new_zeros(d_sae)}
        b_dec = b_dec if centres else torch.zeros_like(b_dec)
    encoder, b_enc = tensors["W_enc"].T, tensors["b_gate" if name == "gated" else "b_enc"]
    if config.get("rescale_acts_by_decoder_norm"):
        norms = W_dec.norm(dim=1).clamp_min(1e-8)
        encoder, b_enc, W_dec = encoder * norms[:, None], b_enc * norms, W_dec / norms[:, None]
    norm_of = {theirs: ours for ours, theirs in _NORMS.items()}
    return assemble(
        _nonlinearity(config, tensors),
        encoder=encoder,
        W_dec=W_dec,
        b_enc=b_enc,
        b_dec=b_dec,
        W_skip=tensors.get("W_skip"),
        apply_b_dec_to_input=centres and name not in _TRANSCODERS,
        input_norm=norm_of.get(config.get("normalize_activations") or "none", "none"),  # type: ignore[arg-type]
    )


def _nonlinearity(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> TopK | ReLU | JumpReLU | Gated | AbsTopK | MatchingPursuit:
    match config["architecture"]:
        case "topk":
            return TopK(int(config["k"]))
        case "abstopk":
            return AbsTopK(int(config["k"]))
        case "gated":
            return Gated(tensors["r_mag"], tensors["b_mag"])
        case "matching_pursuit":
            return MatchingPursuit(
                float(config["residual_threshold"]),
                max_steps=config["max_iterations"],
                stop_on_repeat=bool(config["stop_on_duplicate_support"]),
            )
        case "jumprelu" | "jumprelu_transcoder" | "jumprelu_skip_transcoder":
            return JumpReLU(tensors["threshold"])
        case _:
            return ReLU()


def _metadata(config: Mapping[str, Any]) -> SAEMetadata:
    theirs = config.get("metadata") or {}
    return SAEMetadata(
        model_name=theirs.get("model_name") or "",
        site=theirs.get("hook_name") or "",
        site_out=theirs.get("hook_name_out") or "",
    )
