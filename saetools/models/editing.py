"""Editing the residual stream: pure functions attached to sites for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from saetools.errors import InputError
from saetools.models.language_model import LanguageModel
from saetools.models.layout import Access, locate
from saetools.models.passes import Passes
from saetools.models.site import Site
from saetools.models.where import Edit


@runtime_checkable
class Stackable(Protocol):
    """An edit that can run as one with others of its structure, in a batch whose rows have edits of their own."""

    def structure(self) -> Hashable:
        """Equal for edits that can be stacked."""
        ...

    def stacked(self, others: Sequence[Any], choice: Int[Tensor, " row"]) -> Edit:
        """One edit that does to each row of a batch what one of some edits does.

        Args:
            others: the edits, of one structure.
            choice: number of the row's edit among them; of rows that it does not get, anything.
        """
        ...


Edits = Mapping[Site, Edit | Sequence[Edit]]
"""What to do at each site; several edits at one site run in their order."""


@contextmanager
def edit(
    lm: LanguageModel, edits: Edits, *, roles: UInt8[Tensor, "row width"] | None = None, width: int | None = None
) -> Iterator[None]:
    """Edit the residual stream of every forward pass inside the block.

    Works for our own functions, Hugging Face `generate`, and calls of a TransformerLens model. Blocks nest: the outer
    edits run first. Hooks come off when the block ends, also by an exception.

    Args:
        lm: the model; views of the same weights are edited with it.
        edits: edits per site.
        roles: role flags of the batch that will be run (with its padding), for edits scoped by role; tokens after
            them count as response.
        width: tokens in a row of that batch, padding included, for edits of generated tokens; given by
            `roles`, where there are any.

    Raises:
        InputError: if a site does not exist in this model; in the forward pass, if an edit returns another shape, or
            if mask or roles do not fit the batch.

    Example:
        >>> with edit(lm, {Site(1): lambda acts, where: 0 * acts}):
        ...     zeroed = lm.model(**lm.tokenizer("Hello there", return_tensors="pt")).logits
    """
    with edit_passes(lm, edits, Passes(roles=roles, width=width, special_ids=lm.special_ids)):
        yield


@contextmanager
def edit_passes(lm: LanguageModel, edits: Edits, passes: Passes) -> Iterator[None]:
    """The same, for who knows more of the passes that will be run."""
    plans = [(*locate(lm.model, lm.layout, site), as_sequence(fns)) for site, fns in edits.items()]
    if not plans:
        yield
        return
    with passes.followed(lm), ExitStack() as hooks:
        for module, access, fns in plans:
            hooks.callback(attach(module, access, partial(passes.apply, fns)).remove)
        yield


def attach(module: nn.Module, access: Access, fn: Callable[[Tensor], Tensor | None]) -> Any:
    """Hook a stream of a module: `fn` sees it and may return another value for it. Returns the hook's handle."""

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return fn(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            new = fn(output[0])
            return None if new is None else (new, *output[1:])
        if isinstance(output, Mapping):
            name = _tensor_of(output, "last_hidden_state", module)
            new = fn(output[name])
            return None if new is None else type(output)(**{**output, name: new})
        raise _no_tensor(module, type(output).__name__)

    def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = fn(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        name = _tensor_of(kwargs, "hidden_states", module)
        new = fn(kwargs[name])
        return None if new is None else (args, {**kwargs, name: new})

    def on_input_in_place(_module: nn.Module, args: tuple[Any, ...]) -> None:
        acts = args[0]
        new = fn(acts.clone() if torch.is_grad_enabled() else acts)  # autograd may need what `fn` saw: keep it
        if new is not None and new is not acts:
            acts.copy_(new)

    match access:
        case "output":
            return module.register_forward_hook(on_output)
        case "input":
            return module.register_forward_pre_hook(on_input, with_kwargs=True)
        case "input_in_place":
            return module.register_forward_pre_hook(on_input_in_place)


def as_sequence(fns: Edit | Sequence[Edit]) -> Sequence[Edit]:
    """The edits of a site as several."""
    return fns if isinstance(fns, Sequence) else (fns,)


def written_edits(edits: Edits) -> str:
    """Edits as they print, each after its site."""
    return "; ".join(f"{site}: {', '.join(map(repr, as_sequence(fns)))}" for site, fns in edits.items())


def _tensor_of(values: Mapping[str, Any], usual: str, module: nn.Module) -> str:
    """The name of the activations among named values."""
    names = [name for name, value in values.items() if isinstance(value, Tensor)]
    if not names:
        raise _no_tensor(module, ", ".join(values) or "nothing")
    return usual if usual in names else names[0]


def _no_tensor(module: nn.Module, received: str) -> InputError:
    return InputError(
        "edits",
        expected="modules that take and give a tensor, or one among others",
        received=f"{received} of {type(module).__name__}",
        remedy="edit another module",
    )
