"""Gemma Scope's `params.npz` and Gemma Scope 2's `params.safetensors`: JumpReLU SAEs and transcoders, read only.

Both hold `W_enc` [d_in, d_sae], `W_dec` [d_sae, d_out], `b_enc`, `b_dec` and a `threshold` per latent; the second
spells them in small letters and may add `affine_skip_connection` [d_in, d_out] and a `config.json` with the sites.
`b_dec` is not subtracted from the input. The first has no config: model and site are in the names of its folders only,
and stay empty here. Its SAEs of the embeddings expect `hook_embed` divided by sqrt(d_model).
"""

from __future__ import annotations

import re

from saetools.errors import InputError
from saetools.sae.formats.files import Checkpoint, assemble, check_shapes, refuse_unknown, width
from saetools.sae.model import SAE, SAEMetadata
from saetools.sae.nonlinearity import JumpReLU

_KEYS = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
_SKIP = "affine_skip_connection"


def matches(checkpoint: Checkpoint) -> bool:
    """Whether keys are those of this format; capital letters outside npz are other formats' names."""
    names = {name.lower() for name in checkpoint.names} if checkpoint.file.suffix == ".npz" else checkpoint.names
    return names >= _KEYS and (not checkpoint.config or "hf_hook_point_in" in checkpoint.config)


def load(checkpoint: Checkpoint) -> SAE:
    """Read an SAE or a transcoder of one layer.

    Raises:
        InputError: for a cross-layer transcoder, a crosscoder or another architecture.
        IntegrityError: if tensors are missing or have other shapes.
    """
    file, config = checkpoint.file, checkpoint.config
    tensors = {name.lower(): tensor for name, tensor in checkpoint.tensors().items()}
    n_dims = tensors["w_dec"].ndim
    if n_dims != 2 or config.get("architecture", "jump_relu") != "jump_relu":
        raise InputError(
            "path",
            expected="a jump_relu SAE or transcoder of one layer",
            received=f"{config.get('architecture', 'jump_relu')} with a w_dec of {n_dims} dimensions in {file}",
            remedy="pick an SAE or a transcoder of one layer",
        )
    site, site_out = (_site(config.get(f"hf_hook_point_{end}")) for end in ("in", "out"))
    transcodes = _SKIP in tensors or (site_out not in ("", site))
    d_sae, d_out = width(tensors, "b_enc", file), width(tensors, "b_dec", file)
    d_in = tensors["w_enc"].shape[0] if transcodes else d_out
    shapes = {"w_enc": (d_in, d_sae), "w_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,)}
    shapes["threshold"] = (d_sae,)
    if _SKIP in tensors:
        shapes[_SKIP] = (d_in, d_out)
    check_shapes(tensors, shapes, file)
    if bool((tensors.get("scaling_factor", tensors["b_enc"].new_ones(1)) == 1).all()):
        tensors.pop("scaling_factor", None)  # never used
    refuse_unknown(tensors, shapes, file)
    return assemble(
        JumpReLU(tensors["threshold"]),
        encoder=tensors["w_enc"].T,
        W_dec=tensors["w_dec"],
        b_enc=tensors["b_enc"],
        b_dec=tensors["b_dec"],
        W_skip=tensors[_SKIP].T if _SKIP in tensors else None,
        apply_b_dec_to_input=False,
        metadata=SAEMetadata(
            model_name=config.get("model_name") or "", site=site, site_out=site_out if transcodes else ""
        ),
    )


def _site(hook: str | None) -> str:
    """The TransformerLens name of a module's output where there is one, else the name as given."""
    for pattern, stream in (
        (r"model\.(?:language_model\.)?layers\.(\d+)\.output", "resid_post"),
        (r"model\.(?:language_model\.)?layers\.(\d+)\.post_feedforward_layernorm\.output", "mlp_out"),
    ):
        if match := re.fullmatch(pattern, hook or ""):
            return f"blocks.{match[1]}.hook_{stream}"
    return hook or ""
