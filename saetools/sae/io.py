"""SAEs on disk, in the folder format of SAELens: `cfg.json` and `sae_weights.safetensors`."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetools.errors import InputError, IntegrityError, SaetoolsWarning
from saetools.provenance import sha256_of_file, write_json
from saetools.sae.model import SAE, SAEMetadata
from saetools.sae.nonlinearity import JumpReLU, TopK

_CONFIG, _WEIGHTS, _STATISTICS = "cfg.json", "sae_weights.safetensors", "latent_statistics.safetensors"
_ARCHITECTURES = ("topk", "standard", "jumprelu")


def save_sae(sae: SAE, path: str | Path, *, storage_dtype: torch.dtype | None = None) -> Path:
    """Write an SAE so that `load_sae` and `sae_lens.SAE.load_from_disk` read it.

    The 99th percentiles of the latents, which SAELens does not know, lie in a file beside.

    Args:
        sae: what to write.
        path: folder; made if missing. The config is written last, so a folder with a config is complete.
        storage_dtype: dtype of the weights on disk, such as `float16` to halve the size; both readers cast back to the
            SAE's dtype.

    Returns:
        The folder.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / _CONFIG).unlink(missing_ok=True)
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    architecture: dict[str, Any] = {"architecture": "jumprelu"}
    if isinstance(sae.nonlinearity, JumpReLU):
        tensors["threshold"] = sae.nonlinearity.threshold
    else:
        architecture = {"architecture": "topk", "k": sae.nonlinearity.k, "rescale_acts_by_decoder_norm": False}
    stored = {
        key: tensor.detach().to("cpu", storage_dtype or tensor.dtype).contiguous() for key, tensor in tensors.items()
    }
    _replace(path / _WEIGHTS, lambda file: save_file(stored, file))
    (path / _STATISTICS).unlink(missing_ok=True)
    if sae.p99 is not None:
        statistics = {"p99": sae.p99.detach().cpu().float().contiguous()}
        _replace(path / _STATISTICS, lambda file: save_file(statistics, file))
    metadata = sae.metadata
    config = {
        **architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": version("sae-lens"),
            "model_name": metadata.model_name,
            "hook_name": metadata.site,
            "saetools": {**dataclasses.asdict(metadata), "weights_sha256": sha256_of_file(path / _WEIGHTS)},
        },
    }
    write_json(path / _CONFIG, config)
    return path


def load_sae(path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> SAE:
    """Read an SAE in SAELens' folder format: TopK, standard (ReLU) or JumpReLU.

    Configs from before SAELens 6 are understood as SAELens 6 understands them.

    Args:
        path: the folder with `cfg.json` and `sae_weights.safetensors`.
        dtype: of the weights in memory.
        device: of the weights.

    Raises:
        InputError: if there is no such folder, or for an architecture or a normalisation that is not supported.
        IntegrityError: if a file is damaged, shapes do not fit, or the weights are not those the config was written
            with.

    Example:
        >>> sae = load_sae("data/sae/smollm2-135m")
        >>> sae(torch.zeros(1, 576)).shape
        torch.Size([1, 576])
    """
    path = Path(path).expanduser()
    if not (path / _CONFIG).is_file() or not (path / _WEIGHTS).is_file():
        raise InputError(
            "path",
            expected=f"a folder with {_CONFIG} and {_WEIGHTS}",
            received=str(path),
            remedy="point at a folder that saetools or SAELens saved",
        )
    try:
        config = _modernise(json.loads((path / _CONFIG).read_text(encoding="utf-8")))
        ours = (config.get("metadata") or {}).get("saetools")
        if ours and ours["weights_sha256"] != sha256_of_file(path / _WEIGHTS):
            raise IntegrityError(f"{path / _WEIGHTS} is not the file that {_CONFIG} was written with; save it again")
        _check_supported(config, path)
        sae = _build(config, _read_tensors(path / _WEIGHTS, device, dtype), path)
        sae.metadata = _metadata(config, ours)
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise IntegrityError(f"{path / _CONFIG} is damaged ({error!r}); fetch or save the SAE again") from error
    if (path / _STATISTICS).is_file():
        p99 = _read_tensors(path / _STATISTICS, device, torch.float32).get("p99")
        if p99 is None or p99.shape != (sae.d_sae,):
            raise IntegrityError(
                f"{path / _STATISTICS} does not belong to these weights; delete it or save the SAE again"
            )
        sae.p99 = p99
    return sae.eval().requires_grad_(False)


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


def _check_supported(config: Mapping[str, Any], path: Path) -> None:
    if config.get("architecture") not in _ARCHITECTURES:
        raise InputError(
            "path",
            expected="an SAE of architecture " + ", ".join(_ARCHITECTURES),
            received=f"{config.get('architecture')!r} in {path}",
            remedy="load one of these architectures",
        )
    for key in ("normalize_activations", "reshape_activations"):
        if config.get(key) not in ("none", None, "expected_average_only_in"):
            raise InputError(
                "path", expected=f"{key} of none", received=repr(config[key]), remedy="fold it into the weights first"
            )
    if config.get("normalize_activations") == "expected_average_only_in":
        warnings.warn(
            f"{path} was trained on activations scaled to a mean norm of sqrt(d_in). SAELens folds that scale into the "
            "weights when it saves and then says so; this config does not. If latents are far too strong, it was not "
            "folded: scale the inputs",
            SaetoolsWarning,
            stacklevel=3,
        )


def _read_tensors(file: Path, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {key: tensor.to(device, dtype) for key, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{file} is damaged ({error}); fetch or save the SAE again") from error


def _build(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> SAE:
    d_in, d_sae = int(config["d_in"]), int(config["d_sae"])
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    if config["architecture"] == "jumprelu":
        shapes["threshold"] = (d_sae,)
    for key, shape in shapes.items():
        received = tuple(tensors[key].shape) if key in tensors else "nothing"
        if received != shape:
            raise IntegrityError(f"{key} in {path / _WEIGHTS}: expected shape {shape}, received {received}")
    # SAELens once wrote a scaling factor of ones, and ignores it.
    unknown = [
        key for key in tensors if key not in shapes and (key != "scaling_factor" or bool((tensors[key] != 1).any()))
    ]
    if unknown:
        raise InputError(
            "path",
            expected="weights " + ", ".join(shapes),
            received=f"also {', '.join(unknown)} in {path / _WEIGHTS}",
            remedy="fold what is beyond these into them",
        )
    encoder, decoder, b_enc = tensors["W_enc"].T, tensors["W_dec"], tensors["b_enc"]
    if config.get("rescale_acts_by_decoder_norm"):
        norms = decoder.norm(dim=1).clamp_min(1e-8)
        encoder, b_enc, decoder = encoder * norms[:, None], b_enc * norms, decoder / norms[:, None]
    if config["architecture"] == "topk":
        nonlinearity: TopK | JumpReLU = TopK(int(config["k"]))
    else:
        nonlinearity = JumpReLU(tensors.get("threshold", torch.zeros_like(b_enc)))
    sae = SAE(
        d_in, d_sae, nonlinearity, apply_b_dec_to_input=bool(config.get("apply_b_dec_to_input", True)), device="meta"
    )
    sae.encoder = torch.nn.Parameter(encoder.contiguous())
    sae.W_dec = torch.nn.Parameter(decoder.contiguous())
    sae.b_enc = torch.nn.Parameter(b_enc)
    sae.b_dec = torch.nn.Parameter(tensors["b_dec"])
    return sae


def _metadata(config: Mapping[str, Any], ours: Mapping[str, Any] | None) -> SAEMetadata:
    if ours:
        names = {field.name for field in dataclasses.fields(SAEMetadata)}
        return SAEMetadata(**{key: value for key, value in ours.items() if key in names})
    theirs = config.get("metadata") or {}
    return SAEMetadata(model_name=theirs.get("model_name") or "", site=theirs.get("hook_name") or "")


def _replace(file: Path, write: Callable[[Path], None]) -> None:
    temporary = file.with_suffix(".tmp")
    try:
        write(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
