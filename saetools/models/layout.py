"""Which module of which architecture holds what: the only file that knows the insides of model families."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from saetools.errors import InputError
from saetools.models.site import Site

Access = Literal["input", "output", "input_in_place"]


@dataclass(frozen=True)
class Layout:
    """Module paths of one family: those of streams from a decoder layer, the others from the causal LM."""

    backbone: str
    """Receives the attention mask, the cache, and token ids or embeddings."""
    layers: str
    norm: str
    """The norm before the head."""
    attn_out: str
    """Outputs what attention adds to the residual stream."""
    mlp_out: str
    """Outputs what the MLP adds to the residual stream."""
    mid_norm: str
    """Receives the residual stream between attention and MLP."""
    embedding: str | None = None
    """Receives the token ids, where the backbone does not."""


_LLAMA = Layout(
    backbone="model",
    layers="model.layers",
    norm="model.norm",
    attn_out="self_attn",
    mlp_out="mlp",
    mid_norm="post_attention_layernorm",
)
_GEMMA = Layout(
    backbone="model",
    layers="model.layers",
    norm="model.norm",
    attn_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    mid_norm="pre_feedforward_layernorm",
)
# With vision; text alone is enough to run it.
_GEMMA3 = replace(_GEMMA, layers="model.language_model.layers", norm="model.language_model.norm")
_GPT2 = Layout(
    backbone="transformer",
    layers="transformer.h",
    norm="transformer.ln_f",
    attn_out="attn",
    mlp_out="mlp",
    mid_norm="ln_2",
)
_GPT_NEOX = Layout(
    backbone="gpt_neox",
    layers="gpt_neox.layers",
    norm="gpt_neox.final_layer_norm",
    attn_out="post_attention_dropout",
    mlp_out="post_mlp_dropout",
    mid_norm="post_attention_layernorm",
)

_HF_LAYOUTS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
}

# HookedTransformer has an identity module at every stream. Its `generate` calls no module that has the token ids, the
# mask and the cache together; the first block gets the mask that is really used, also where none was given.
_HOOKED = Layout(
    backbone="blocks.0",
    embedding="embed",
    layers="blocks",
    norm="ln_final",
    attn_out="hook_attn_out",
    mlp_out="hook_mlp_out",
    mid_norm="hook_resid_mid",
)


def is_hooked_transformer(model: nn.Module) -> bool:
    """Whether this is TransformerLens' `HookedTransformer` (looked up by name, to keep its slow import away)."""
    return any(cls.__name__ == "HookedTransformer" for cls in type(model).__mro__)


def layout_of(model: nn.Module) -> Layout:
    """The layout of a Hugging Face causal LM or a `HookedTransformer`.

    Raises:
        InputError: for a family that saetools does not know.
    """
    return _HOOKED if is_hooked_transformer(model) else layout_of_config(getattr(model, "config", None))


def layout_of_config(config: Any) -> Layout:
    """The layout of the models with a Hugging Face config.

    Raises:
        InputError: for a family that saetools does not know.
    """
    kind = getattr(config, "model_type", None)
    if kind not in _HF_LAYOUTS:
        raise InputError(
            "model",
            expected="a causal LM of one of the families " + ", ".join(sorted(_HF_LAYOUTS)),
            received=f"model_type {kind!r}",
            remedy="load another model, or add its module paths to saetools/models/layout.py",
        )
    return _HF_LAYOUTS[kind]


def head_of(model: nn.Module) -> nn.Module:
    """The map from the normalised residual to logits."""
    known: Any = model
    head: nn.Module = known.unembed if is_hooked_transformer(model) else known.get_output_embeddings()
    return head


def submodule(module: nn.Module, path: str) -> nn.Module:
    """Follow a dotted path, through the wrappers that TransformerBridge puts around layers."""
    for name in filter(None, path.split(".")):
        inner: Any = getattr(module, "_original_component", None)
        module = getattr(inner if inner is not None and hasattr(inner, name) else module, name)
    return module


def locate(model: nn.Module, layout: Layout, site: Site) -> tuple[nn.Module, Access]:
    """The module to hook for a site, and whether the stream is its input or its output.

    `resid_mid` is the input of the second norm and at the same time what the MLP's output is added to, so it can only
    be edited in place.

    Raises:
        InputError: if the layer does not exist, or for `resid_mid` where attention and MLP run in parallel.
    """
    layers = submodule(model, layout.layers)
    n_layers = len(layers)  # type: ignore[arg-type]
    if site.layer >= n_layers:
        raise InputError(
            "site", expected=f"a layer below {n_layers}", received=str(site), remedy="this model has fewer layers"
        )
    layer: nn.Module = layers[site.layer]  # type: ignore[index]
    if site.stream == "resid_mid" and _is_parallel(model):
        raise InputError(
            "site",
            expected="a model that computes attention before the MLP",
            received=f"{site} of {type(model).__name__} with parallel attention and MLP",
            remedy="use resid_pre or resid_post",
        )
    if layout is _HOOKED:
        return submodule(layer, f"hook_{site.stream}"), "output"
    match site.stream:
        case "resid_pre":
            return layer, "input"
        case "resid_post":
            return layer, "output"
        case "attn_out":
            return submodule(layer, layout.attn_out), "output"
        case "mlp_out":
            return submodule(layer, layout.mlp_out), "output"
        case "resid_mid":
            return submodule(layer, layout.mid_norm), "input_in_place"


def _is_parallel(model: nn.Module) -> bool:
    config: Any = getattr(model, "cfg", None) or getattr(model, "config", None)
    return bool(getattr(config, "use_parallel_residual", False) or getattr(config, "parallel_attn_mlp", False))
