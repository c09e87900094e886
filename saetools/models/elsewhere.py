"""Edits in other places: as hook functions of TransformerLens, and on modules of any model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from saetools.errors import InputError
from saetools.models.editing import Edits, as_sequence, attach
from saetools.models.layout import Access, is_hooked_transformer, locate
from saetools.models.load import load_model
from saetools.models.passes import Passes
from saetools.models.site import Site
from saetools.models.where import Edit

HookFunction = Callable[[Tensor, Any], Tensor]
"""What TransformerLens calls with activations and the hook point."""

_OF_BRIDGE = {  # the first that is there: its aliases, which are called as ours, do not fire in every kind of bridge
    "resid_pre": ("hook_in",),
    "attn_out": ("ln1_post.hook_out", "attn.hook_out"),
    "resid_mid": ("ln2.hook_in",),
    "mlp_out": ("ln2_post.hook_out", "mlp.hook_out"),
    "resid_post": ("hook_out",),
}


@contextmanager
def hook_functions(
    model: nn.Module, edits: Edits, *, roles: UInt8[Tensor, "row width"] | None = None, width: int | None = None
) -> Iterator[list[tuple[str, HookFunction]]]:
    """Edits as `fwd_hooks` of TransformerLens, to run beside other hooks and in an order with them.

    Inside the block, forward passes are followed, so that the functions know which tokens they see, also under a cache.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`.
        edits: edits per site.
        roles: as of `edit`.
        width: as of `edit`.

    Raises:
        InputError: for another model, or a site that it does not have.

    Example:
        >>> import copy
        >>> from transformer_lens.model_bridge import TransformerBridge
        >>> model = copy.deepcopy(lm.model)  # a bridge changes it
        >>> bridge = TransformerBridge.boot_transformers("x/llama", hf_model=model, tokenizer=lm.tokenizer)
        >>> with hook_functions(bridge, {Site(1): steer.project_out(torch.ones(576))}) as hooks:
        ...     logits = bridge.run_with_hooks(torch.tensor([[5, 6, 7]]), fwd_hooks=hooks)
    """
    hooked = is_hooked_transformer(model)
    if not hooked and not hasattr(model, "run_with_hooks"):
        raise InputError(
            "model",
            expected="a HookedTransformer or a TransformerBridge",
            received=type(model).__name__,
            remedy="use saetools.edit: it places the hooks itself",
        )
    lm = load_model(model)
    for site in edits:
        locate(lm.model, lm.layout, site)
    passes = Passes(roles=roles, width=width, special_ids=lm.special_ids)

    def run(fns: Sequence[Edit], acts: Tensor, hook: Any) -> Tensor:
        return passes.apply(fns, acts)

    def run_in_place(fns: Sequence[Edit], acts: Tensor, hook: Any) -> Tensor:
        """Of a stream that a norm reads and the MLP's output is added to."""
        return acts.copy_(passes.apply(fns, acts.clone() if torch.is_grad_enabled() else acts))

    def named(site: Site) -> str:
        if hooked:
            return str(site)
        points: Any = model.hook_dict
        names = [f"blocks.{site.layer}.{own}" for own in _OF_BRIDGE[site.stream]]
        if (found := next((name for name in names if name in points), None)) is None:
            raise InputError(
                "edits", expected=f"a bridge with {names[0]}", received=str(site), remedy="use saetools.edit instead"
            )
        return found

    functions: list[tuple[str, HookFunction]] = [
        (named(site), partial(run if hooked or site.stream != "resid_mid" else run_in_place, as_sequence(fns)))
        for site, fns in edits.items()
    ]
    with passes.followed(lm):
        yield functions


@contextmanager
def edit_modules(
    model: nn.Module,
    edits: Mapping[str, Edit | Sequence[Edit]],
    *,
    access: Access = "output",
    roles: UInt8[Tensor, "row width"] | None = None,
    width: int | None = None,
) -> Iterator[None]:
    """Edit what modules of any PyTorch model put out, or are given, inside the block.

    For architectures that saetools does not know, and for models that are no language models. Which tokens a module
    sees is read from the `input_ids`, `attention_mask` and `past_key_values` that `model` is called with; where it gets
    none of these, activations of shape [row, pos, width] are whole rows without padding.

    Args:
        model: the model that is called.
        edits: edits by the module's dotted name in `model`, such as `transformer.h.3`.
        access: edit the module's `output` (the first of a tuple) or its `input`.
        roles: as of `edit`.
        width: as of `edit`.

    Raises:
        InputError: if there is no such module; in the forward pass, if activations have another number of dimensions.

    Example:
        >>> block = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> with edit_modules(block, {"0": lambda acts, where: 0 * acts}):
        ...     bool((block(torch.ones(1, 3, 4)) == block[1].bias).all())
        True
    """
    modules = dict(model.named_modules())
    if unknown := [name for name in edits if name not in modules]:
        raise InputError(
            "edits", expected="names of modules of the model", received=repr(unknown[0]), remedy="see named_modules()"
        )
    passes = Passes(roles=roles, width=width)
    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(passes.begin_any, with_kwargs=True).remove)
        for name, fns in edits.items():
            hooks.callback(attach(modules[name], access, partial(passes.apply, as_sequence(fns))).remove)
        yield
