"""Edits for use elsewhere: as a llama.cpp control vector, or baked into the weights of a plain checkpoint.

Only what is the same on every token, whatever the residual is, can leave saetools: pushes become control vectors or
biases; linear maps of what attention and MLPs write become their weights. Conditions, token roles and everything on
latents but `add` stay here: nothing else runs them. Both ways the first token of a context is edited as well.
"""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saetools.errors import InputError
from saetools.models.editing import Edits, as_sequence
from saetools.models.language_model import LanguageModel
from saetools.models.layout import is_hooked_transformer, locate, submodule
from saetools.models.quiet import quiet
from saetools.models.site import Site
from saetools.room import enough_room
from saetools.steer.changes import AffineMap, ComponentMap, LatentMap, Push
from saetools.steer.edits import Part, SteeringEdit

_ATTENTION, _MLP, _EMBEDDING = "attention", "mlp", "embedding"
# Where a family keeps what attention and MLP write, and the config's switch for a bias there: with the modules that it
# gives one; `True` if there is one in any case, `None` if there can be none.
_WRITERS: dict[str, dict[str, tuple[str, Any]]] = {
    "llama": {
        _ATTENTION: ("self_attn.o_proj", ("attention_bias", ("q_proj", "k_proj", "v_proj", "o_proj"))),
        _MLP: ("mlp.down_proj", ("mlp_bias", ("gate_proj", "up_proj", "down_proj"))),
    },
    "qwen2": {_ATTENTION: ("self_attn.o_proj", None), _MLP: ("mlp.down_proj", None)},
    "gpt2": {_ATTENTION: ("attn.c_proj", True), _MLP: ("mlp.c_proj", True)},
    "gpt_neox": {_ATTENTION: ("attention.dense", True), _MLP: ("mlp.dense_4h_to_h", True)},
}
_WRITERS["smollm3"] = _WRITERS["llama"]
_WRITERS["mistral"] = _WRITERS["qwen2"]
_WRITERS["qwen3"] = _WRITERS["gemma"] = {_ATTENTION: _WRITERS["llama"][_ATTENTION], _MLP: _WRITERS["qwen2"][_MLP]}


def export_control_vector(lm: LanguageModel, edits: Edits, path: str | Path) -> Path:
    """Write pushes of the residual stream as a GGUF control vector for llama.cpp (`--control-vector FILE`).

    llama.cpp adds `direction.L` after layer L on every token, the first included; it has none for layer 0.

    Args:
        lm: the model that they are meant for.
        edits: `add` and `add_direction`, at the output of a layer, on all tokens: `.on(skip_first=False)`.
        path: the file.

    Raises:
        InputError: for other edits, tokens or sites.
        ResourceError: if disk space runs out; there is no file then.

    Example:
        >>> import tempfile
        >>> push = steer.add_direction(torch.ones(576), 0.5).on(skip_first=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_control_vector(lm, {Site(15): push}, f"{folder}/push.gguf").stat().st_size > 576 * 4
        True
    """
    import gguf

    vectors: dict[int, Tensor] = {}
    for site, part in _parts(lm, edits):
        layer, vector = site.layer - (site.stream == "resid_pre"), _pushed(part)
        if vector is None or site.stream not in ("resid_pre", "resid_post") or layer < 1:
            raise InputError(
                "edits",
                expected="add or add_direction after layers 1 and above",
                received=f"{part} at {site}",
                remedy="bake it into the weights, or run it in saetools",
            )
        vectors[layer] = vectors[layer] + vector if layer in vectors else vector
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with enough_room(str(path)):
            writer = gguf.GGUFWriter(temporary, "controlvector")
            writer.add_string("controlvector.model_hint", str(_config(lm).model_type))
            writer.add_uint32("controlvector.layer_count", len(vectors))
            for layer, vector in sorted(vectors.items()):
                writer.add_tensor(f"direction.{layer}", vector.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            if temporary.stat().st_size < sum(vector.nbytes for vector in vectors.values()):
                raise OSError(errno.ENOSPC, "written in part")  # numpy does not say so
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def bake_edits(lm: LanguageModel, edits: Edits, out: str | Path) -> Path:
    """Put edits into the weights and save a plain Hugging Face checkpoint, whose outputs are those under the edits.

    Pushes become biases (where the architecture has a switch for them) or go into the embedding. `project_out`,
    `project_to`, `mean_ablate` and `affine` can be baked at what attention or an MLP writes (`attn_out`, `mlp_out`) and
    at the embedding (`resid_pre` of layer 0); to project a direction out of the whole residual stream, do so at all of
    these (arXiv 2406.11717). An adapter of the view is merged.

    Args:
        lm: the view.
        edits: on all tokens: `.on(skip_first=False)`.
        out: folder of the checkpoint, with the tokenizer.

    Raises:
        InputError: for edits that are not affine, other tokens, or where the architecture has no place for them.
        ResourceError: if disk space runs out.

    Example:
        >>> import tempfile
        >>> push = steer.add_direction(torch.ones(576), 0.5).on(skip_first=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load_model(bake_edits(lm, {Site(15): push}, folder)).model.config.mlp_bias
        True
    """
    if is_hooked_transformer(lm.model) or hasattr(lm.layers[0], "_original_component"):
        raise InputError(
            "lm",
            expected="a plain Hugging Face model",
            received="one of TransformerLens, or inside a TransformerBridge",
            remedy="load the original",
        )
    if not all(parameter.is_floating_point() for parameter in lm.model.parameters()):
        raise InputError(
            "lm", expected="weights in floating point", received="quantised ones", remedy="load it without quantization"
        )
    plans = [(_writer(site), site, part) for site, part in _parts(lm, edits)]
    for (kind, layer), site, part in plans:
        _check_baked(lm, kind, layer, site, part)
    model = _merged(lm)
    for (kind, layer), _, part in plans:
        matrix, bias = _affine(part)
        if kind == _EMBEDDING:
            _bake_embedding(model, matrix, bias)
        else:
            _bake_writer(model, lm, kind, layer, matrix, bias)
    out = Path(out)
    with quiet(), enough_room(f"the checkpoint in {out}"):
        model.save_pretrained(out)
        lm.tokenizer.save_pretrained(out)
    return out


def _parts(lm: LanguageModel, edits: Edits) -> Iterable[tuple[Site, Part]]:
    """All changes in their order, which have to be the same on every token."""
    found = []
    for site, fns in sorted(edits.items()):  # as a forward pass reaches them
        locate(lm.model, lm.layout, site)
        for fn in as_sequence(fns):
            if not isinstance(fn, SteeringEdit) or (len(fn.parts) > 1 and None in map(_pushed, fn.parts)):
                raise InputError(
                    "edits",
                    expected="edits of saetools.steer; in a sum, pushes alone",
                    received=repr(fn),
                    remedy="give its parts one by one, in the order in which they shall run",
                )
            found += [(site, part) for part in fn.parts]
    for site, part in found:
        scope = part.scope
        if scope.tokens != ("all",) or scope.start or scope.skip_first or scope.skip_special or part.conditions:
            raise InputError(
                "edits",
                expected="edits of all tokens, the first included",
                received=f"{part} at {site}",
                remedy="make them so: edit.on(skip_first=False)",
            )
        if part.schedule is not None:
            raise InputError(
                "edits", expected="edits of constant weight", received=str(part), remedy="leave out .over(...)"
            )
    return found


def _pushed(part: Part) -> Float[Tensor, " d_model"] | None:
    """What a part adds on every token alike; `None` if it depends on the token."""
    if isinstance(part.change, Push):
        return part.change.vector.float()
    return part.change.vector() if isinstance(part.change, LatentMap) else None


def _writer(site: Site) -> tuple[str, int]:
    """What last wrote to a stream before a site: attention or MLP of a layer, or the embedding."""
    match site.stream:
        case "attn_out" | "resid_mid":
            return _ATTENTION, site.layer
        case "mlp_out" | "resid_post":
            return _MLP, site.layer
        case "resid_pre":
            return (_MLP, site.layer - 1) if site.layer else (_EMBEDDING, 0)


def _check_baked(lm: LanguageModel, kind: str, layer: int, site: Site, part: Part) -> None:
    linear = isinstance(part.change, AffineMap) or (
        isinstance(part.change, ComponentMap) and bool((part.change.low == part.change.high).all())
    )
    at_writer = site.stream in ("attn_out", "mlp_out") or kind == _EMBEDDING
    family = str(_config(lm).model_type)
    if _pushed(part) is None and not (linear and at_writer):
        on_latents = isinstance(part.change, LatentMap)
        raise InputError(
            "edits",
            expected="a push, or a linear map at attn_out, mlp_out or resid_pre of layer 0",
            received=f"{part} at {site}",
            remedy="run it in saetools" if on_latents or not linear else "edit all that is written to the stream",
        )
    if kind == _EMBEDDING:
        if family.startswith("gemma"):
            raise InputError(
                "edits", expected="an embedding that is not scaled", received=family, remedy="edit a later site"
            )
        return
    place = _WRITERS.get(family, {}).get(kind)
    if place is None:
        raise InputError(
            "edits",
            expected="one of the families "
            + ", ".join(sorted(_WRITERS))
            + ", whose layers write to the stream unnormed",
            received=f"{part} at {site} of {family}",
            remedy="run it in saetools",
        )
    writer: Any = submodule(lm.layers[layer], place[0])
    has_bias = isinstance(place[1], tuple) or writer.bias is not None
    if not has_bias and _affine(part)[1] is not None:
        raise InputError(
            "edits",
            expected=f"an edit without a constant at the {kind} of {family}, which has no bias",
            received=f"{part} at {site}",
            remedy="run it in saetools, or export a control vector",
        )


def _affine(part: Part) -> tuple[Float[Tensor, "d_model d_model"] | None, Float[Tensor, " d_model"] | None]:
    """M and b of x + M x + b; `None` where they are 0."""
    change = part.change
    if (vector := _pushed(part)) is not None:
        return None, vector
    if isinstance(change, ComponentMap):
        basis = change.basis
        values = change.low.to(basis)
        return -basis.T @ basis, (values @ basis if bool(values.any()) else None)
    assert isinstance(change, AffineMap)
    return change.matrix, (change.bias if bool(change.bias.any()) else None)


def _config(lm: LanguageModel) -> Any:
    model: Any = lm.model
    return model.config


def _merged(lm: LanguageModel) -> Any:
    """A copy of the causal LM of a view, its adapter merged."""
    if lm.peft is None:
        model: Any = copy.deepcopy(lm.model)
    else:
        peft = copy.deepcopy(lm.peft)
        names = [] if lm.adapter is None else lm.adapter.split("+")
        model = peft.merge_and_unload(adapter_names=names) if names else peft.unload()
    for name in ("quantization_config", "_pre_quantization_dtype"):  # of a GGUF file that it came from
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.is_quantized = False
    model.hf_quantizer = None
    return model


@torch.no_grad()
def _bake_embedding(model: Any, matrix: Tensor | None, bias: Tensor | None) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    rows: Tensor = embedding.weight
    moved = _mapped_rows(rows, matrix)
    rows.copy_(moved if bias is None else moved + bias.to(rows.device))
    if model.config.model_type == "gpt2":  # the embeddings of positions are added to those of tokens
        positions: Tensor = model.transformer.wpe.weight
        positions.copy_(_mapped_rows(positions, matrix))


def _mapped_rows(rows: Tensor, matrix: Tensor | None) -> Tensor:
    """Rows after x + M x, in float64."""
    wide = rows.double()
    return wide if matrix is None else wide + wide @ matrix.to(wide).T


@torch.no_grad()
def _bake_writer(
    model: Any, lm: LanguageModel, kind: str, layer: int, matrix: Tensor | None, bias: Tensor | None
) -> None:
    """Make a module put out y + M y + b where it put out y = W x + c."""
    path, switch = _WRITERS[model.config.model_type][kind]
    layers: Any = submodule(model, lm.layout.layers)
    if bias is not None and isinstance(switch, tuple):
        _give_biases(model, layers, path, *switch)
    module: Any = submodule(layers[layer], path)
    if matrix is not None:
        step, weight = matrix.double(), module.weight.double()
        step = step.to(weight)
        transposed = type(module).__name__ == "Conv1D"  # of GPT-2: [in, out]
        module.weight.copy_(weight + (weight @ step.T if transposed else step @ weight))
        if module.bias is not None:
            module.bias.copy_(module.bias.double() + step @ module.bias.double())
    if bias is not None:
        module.bias.copy_(module.bias.double() + bias.to(module.bias.device).double())


def _give_biases(model: Any, layers: Any, path: str, switch: str, names: Iterable[str]) -> None:
    """Switch biases on, all zero."""
    setattr(model.config, switch, True)
    for layer in layers:
        block = submodule(layer, path.rpartition(".")[0])
        for name in names:
            module: Any = getattr(block, name)
            if module.bias is None:
                module.bias = nn.Parameter(module.weight.new_zeros(module.weight.shape[0]), requires_grad=False)
