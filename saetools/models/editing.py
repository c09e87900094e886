"""Editing the residual stream: pure functions attached to sites for the length of a `with` block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from saetools.data.roles import Role
from saetools.errors import InputError
from saetools.models.language_model import LanguageModel
from saetools.models.layout import Access, locate, submodule
from saetools.models.site import Site


@dataclass(frozen=True)
class Where:
    """Which tokens an edit sees: one forward pass of a batch, maybe continuing a KV cache.

    Args:
        token_ids: tokens of this pass; `None` where the model was given embeddings.
        mask: `False` at padding.
        positions: place of each token in its row, counted over non-padding tokens from 0; -1 at padding.
        roles: `Role` flags; tokens beyond the roles that were given count as response. `None` if none were given.
        rows: row of each batch entry in the batch as given (entries of one row may be several, as in beam search).
        steps: 0 up to the end of the given roles, then the number of tokens generated so far.
    """

    token_ids: Int[Tensor, "row pos"] | None
    mask: Bool[Tensor, "row pos"]
    positions: Int[Tensor, "row pos"]
    roles: UInt8[Tensor, "row pos"] | None
    rows: Int[Tensor, " row"]
    steps: Int[Tensor, " pos"]

    def __getitem__(self, rows: slice | Tensor) -> Where:
        """The same for some rows of the batch."""
        return Where(
            token_ids=None if self.token_ids is None else self.token_ids[rows],
            mask=self.mask[rows],
            positions=self.positions[rows],
            roles=None if self.roles is None else self.roles[rows],
            rows=self.rows[rows],
            steps=self.steps,
        )

    def to(self, device: torch.device) -> Where:
        """The same on the device of a layer."""
        if self.mask.device == device:
            return self
        fields: dict[str, Any] = {
            name: None if field is None else field.to(device) for name, field in vars(self).items()
        }
        return Where(**fields)


Edit = Callable[[Float[Tensor, "row pos d_model"], Where], Float[Tensor, "row pos d_model"]]
"""A pure function of activations and of where they are: `edit(acts, where) -> acts`, both on the device of the layer.

The result has the shape of what was given; it is brought to the layer's dtype.
"""

Edits = Mapping[Site, Edit | Sequence[Edit]]
"""What to do at each site; several edits at one site run in their order."""


@contextmanager
def edit(lm: LanguageModel, edits: Edits, *, roles: UInt8[Tensor, "row width"] | None = None) -> Iterator[None]:
    """Edit the residual stream of every forward pass inside the block.

    Works for our own functions, Hugging Face `generate`, and calls of a TransformerLens model. Blocks nest: the outer
    edits run first. Hooks come off when the block ends, also by an exception.

    Args:
        lm: the model; views of the same weights are edited with it.
        edits: edits per site.
        roles: role flags of the batch that will be run (with its padding), for edits scoped by role; tokens after
            them count as response.

    Raises:
        InputError: if a site does not exist in this model; in the forward pass, if an edit returns another shape, or
            if mask or roles do not fit the batch.

    Example:
        >>> with edit(lm, {Site(1): lambda acts, where: 0 * acts}):
        ...     zeroed = lm.model(**lm.tokenizer("Hello there", return_tensors="pt")).logits
    """
    plans = [(*locate(lm.model, lm.layout, site), _as_sequence(fns)) for site, fns in edits.items()]
    if not plans:
        yield
        return
    current: list[Where] = []
    embedded: list[Tensor] = []

    def embed(_module: nn.Module, args: tuple[Any, ...]) -> None:
        embedded[:] = [args[0]]

    def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current[:] = [_where(module, args, kwargs, roles, embedded)]
        embedded.clear()

    def apply(fns: Sequence[Edit], acts: Tensor) -> Tensor:
        where = current[0].to(acts.device)
        for fn in fns:
            acts = _checked(fn(acts, where), acts)
        return acts

    with ExitStack() as hooks:
        if (embedding := lm.layout.embedding) is not None:
            hooks.callback(submodule(lm.model, embedding).register_forward_pre_hook(embed).remove)
        hooks.callback(lm.backbone.register_forward_pre_hook(capture, with_kwargs=True).remove)
        for module, access, fns in plans:
            hooks.callback(attach(module, access, partial(apply, fns)).remove)
        yield


def attach(module: nn.Module, access: Access, fn: Callable[[Tensor], Tensor | None]) -> Any:
    """Hook a stream of a module: `fn` sees it and may return another value for it. Returns the hook's handle."""

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            new = fn(output[0])
            return None if new is None else (new, *output[1:])
        return fn(output)

    def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = fn(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = fn(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

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


def _checked(new: Any, acts: Tensor) -> Tensor:
    if not isinstance(new, Tensor) or new.shape != acts.shape:
        raise InputError(
            "edits",
            expected=f"an edit that returns activations of shape {tuple(acts.shape)}",
            received=tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__,
            remedy="return all activations that were given, edited or not",
        )
    return new.to(acts.dtype)


def _as_sequence(fns: Edit | Sequence[Edit]) -> Sequence[Edit]:
    return fns if isinstance(fns, Sequence) else (fns,)


def _where(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    roles: Tensor | None,
    embedded: Sequence[Tensor],
) -> Where:
    call = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    call = {**call, **call.pop("kwargs", {})}
    inputs = [call.get(name) for name in ("input_ids", "inputs_embeds", "resid_pre")]
    shaped = next((tensor for tensor in inputs if isinstance(tensor, Tensor)), None)
    if shaped is None:
        raise InputError("input_ids", expected="a tensor", received="none", remedy="tokenise before calling")
    n_rows, n_new = shaped.shape[:2]
    token_ids = next((ids for ids in (inputs[0], *embedded) if ids is not None and ids.shape == (n_rows, n_new)), None)
    start = _cache_length(call)
    mask = _mask(call.get("attention_mask"), n_rows, start + n_new, shaped.device)
    positions = torch.where(mask, mask.cumsum(1) - 1, -1)
    new = slice(start, start + n_new)
    rows = torch.arange(n_rows, device=shaped.device)
    if roles is None:
        steps = torch.zeros(n_new, dtype=torch.long, device=shaped.device)
        return Where(token_ids, mask[:, new], positions[:, new], None, rows, steps)
    if n_rows % len(roles):
        raise InputError(
            "roles",
            expected=f"a number of rows that divides the batch of {n_rows}",
            received=len(roles),
            remedy="pass the roles of the batch that is run",
        )
    rows = rows // (n_rows // len(roles))
    steps = (torch.arange(start, start + n_new, device=shaped.device) - roles.shape[1] + 1).clamp_(min=0)
    known = roles.to(shaped.device)[rows, new]
    beyond = known.new_full((n_rows, n_new - known.shape[1]), int(Role.RESPONSE))
    return Where(token_ids, mask[:, new], positions[:, new], torch.cat([known, beyond], 1) * mask[:, new], rows, steps)


def _mask(given: Any, n_rows: int, length: int, device: torch.device) -> Tensor:
    if given is None:
        return torch.ones(n_rows, length, dtype=torch.bool, device=device)
    shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
    if not isinstance(given, Tensor) or given.ndim != 2 or len(given) != n_rows or given.shape[1] < length:
        raise InputError(
            "attention_mask",
            expected=f"shape ({n_rows}, {length})",
            received=shape,
            remedy="pass the two-dimensional mask over cached and new tokens",
        )
    return given[:, :length].to(device).bool()


def _cache_length(call: Mapping[str, Any]) -> int:
    if (cache := call.get("past_key_values")) is not None:
        return int(cache.get_seq_length())
    if (entry := call.get("past_kv_cache_entry")) is not None:  # TransformerLens has one per layer
        return int(entry.past_keys.shape[1])
    return 0
