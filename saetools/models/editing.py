"""Editing the residual stream: pure functions attached to sites for the length of a `with` block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

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
        steps: 0 for padding and for tokens that were given, then the number of tokens of the row generated so far, this
            one included; `None` where it is not known how many were given.
        special_ids: ids of the tokenizer's special tokens, if it is known.
    """

    token_ids: Int[Tensor, "row pos"] | None
    mask: Bool[Tensor, "row pos"]
    positions: Int[Tensor, "row pos"]
    roles: UInt8[Tensor, "row pos"] | None
    rows: Int[Tensor, " row"]
    steps: Int[Tensor, "row pos"] | None
    special_ids: tuple[int, ...] | None = None

    @property
    def special(self) -> Bool[Tensor, "row pos"]:
        """Where special tokens stand.

        Raises:
            InputError: if ids or tokenizer are not known.
        """
        if self.token_ids is None or self.special_ids is None:
            raise InputError(
                "skip_special",
                expected="token ids, and a tokenizer that knows its special ones",
                received="embeddings" if self.token_ids is None else "no tokenizer",
                remedy="give the model token ids, and edit through a LanguageModel",
            )
        return torch.isin(self.token_ids, torch.tensor(self.special_ids, device=self.token_ids.device))

    @property
    def generated(self) -> Bool[Tensor, "row pos"]:
        """Where tokens stand that the model was not given.

        Raises:
            InputError: if it is not known how many it was given.
        """
        return self.known_steps > 0

    @property
    def known_steps(self) -> Int[Tensor, "row pos"]:
        """The steps.

        Raises:
            InputError: if it is not known how many tokens were given.
        """
        if self.steps is None:
            raise InputError(
                "width",
                expected="how many tokens the model is given, for edits of generated ones",
                received="neither width nor roles",
                remedy="pass width=input_ids.shape[1] where edits are switched on",
            )
        return self.steps

    def __getitem__(self, rows: slice | Tensor) -> Where:
        """The same for some rows of the batch."""
        return replace(
            self,
            token_ids=None if self.token_ids is None else self.token_ids[rows],
            mask=self.mask[rows],
            positions=self.positions[rows],
            roles=None if self.roles is None else self.roles[rows],
            rows=self.rows[rows],
            steps=None if self.steps is None else self.steps[rows],
        )

    def to(self, device: torch.device) -> Where:
        """The same on the device of a layer."""
        if self.mask.device == device:
            return self
        fields: dict[str, Any] = {
            name: field.to(device) for name, field in vars(self).items() if isinstance(field, Tensor)
        }
        return replace(self, **fields)


Edit = Callable[[Float[Tensor, "row pos d_model"], Where], Float[Tensor, "row pos d_model"]]
"""A pure function of activations and of where they are: `edit(acts, where) -> acts`, both on the device of the layer.

The result has the shape of what was given; it is brought to the layer's dtype.
"""


@runtime_checkable
class Stackable(Protocol):
    """An edit that can run as one with others of its structure, in a batch whose rows have edits of their own."""

    def structure(self) -> Hashable:
        """Equal for edits that can be stacked."""
        ...

    def stacked(self, others: Sequence[Any], rows: Int[Tensor, " row"]) -> Edit:
        """One edit that does to each of some rows of a batch, given in ascending order, what the row's own does."""
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
    plans = [(*locate(lm.model, lm.layout, site), as_sequence(fns)) for site, fns in edits.items()]
    if not plans:
        yield
        return
    passes = Passes(roles, width, lm.special_ids)
    with passes.followed(lm), ExitStack() as hooks:
        for module, access, fns in plans:
            hooks.callback(attach(module, access, partial(passes.apply, fns)).remove)
        yield


class Passes:
    """Knows where the activations of the forward pass stand that is running, and edits them.

    Args:
        roles: of the batch that is run.
        width: of the batch that is run.
        special_ids: of the tokenizer.
    """

    def __init__(
        self, roles: UInt8[Tensor, "row width"] | None, width: int | None, special_ids: tuple[int, ...] | None
    ) -> None:
        if roles is not None and width is not None and roles.shape[1] != width:
            raise InputError(
                "width", expected=f"{roles.shape[1]}, that of the roles", received=width, remedy="pass one of the two"
            )
        self._roles = roles
        self._width = width if roles is None else roles.shape[1]
        self._special_ids = special_ids
        self._embedded: list[Tensor] = []
        self._where: Where | None = None

    @contextmanager
    def followed(self, lm: LanguageModel) -> Iterator[None]:
        """Follow the forward passes of a model inside the block."""
        with ExitStack() as hooks:
            if (embedding := lm.layout.embedding) is not None:
                hooks.callback(submodule(lm.model, embedding).register_forward_pre_hook(self._embed).remove)
            hooks.callback(lm.backbone.register_forward_pre_hook(self.begin, with_kwargs=True).remove)
            yield

    def _embed(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep token ids, of an embedding that sees what the backbone does not."""
        self._embedded[:] = [args[0]]

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook for the backbone: a pass begins.

        Raises:
            InputError: if it is given no tokens.
        """
        self.begin_any(module, args, kwargs)
        if self._where is None:
            raise InputError("input_ids", expected="a tensor", received="none", remedy="tokenise before calling")

    def begin_any(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The same for any module; where it is given no tokens, activations are whole rows."""
        call = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        call = {**call, **call.pop("kwargs", {})}
        inputs = [call.get(name) for name in ("input_ids", "inputs_embeds", "resid_pre")]
        shaped = next((tensor for tensor in inputs if isinstance(tensor, Tensor)), None)
        self._where = None if shaped is None else self._placed(call, inputs[0], shaped)
        self._embedded.clear()

    def apply(self, fns: Sequence[Edit], acts: Tensor) -> Tensor:
        """Run edits, in their order."""
        where = (self._whole_rows(acts) if self._where is None else self._where).to(acts.device)
        for fn in fns:
            acts = _checked(fn(acts, where), acts)
        return acts

    def _whole_rows(self, acts: Tensor) -> Where:
        """Where for activations of a model that is given no tokens."""
        if acts.ndim != 3:
            raise InputError(
                "edits",
                expected="modules with activations of shape [row, pos, width]",
                received=tuple(acts.shape),
                remedy="edit another module",
            )
        return self._where_of(None, torch.ones(acts.shape[:2], dtype=torch.bool, device=acts.device), 0)

    def _placed(self, call: Mapping[str, Any], input_ids: Any, shaped: Tensor) -> Where:
        n_rows, n_new = shaped.shape[:2]
        candidates = (input_ids, *self._embedded)
        token_ids = next((ids for ids in candidates if ids is not None and ids.shape == (n_rows, n_new)), None)
        start = _cache_length(call)
        mask = _mask(call.get("attention_mask"), n_rows, start + n_new, shaped.device)
        return self._where_of(token_ids, mask, start)

    def _where_of(self, token_ids: Tensor | None, mask: Bool[Tensor, "row past_and_pos"], start: int) -> Where:
        """Where for a pass over the last columns of a mask."""
        (n_rows, end), device = mask.shape, mask.device
        new = slice(start, end)
        positions = torch.where(mask, mask.cumsum(1) - 1, -1)
        steps = None
        if self._width is not None:
            n_given = mask[:, : self._width].sum(1, keepdim=True)
            steps = (positions[:, new] - n_given + 1).clamp_(min=0)
        rows, roles = torch.arange(n_rows, device=device), None
        if self._roles is not None:
            rows, roles = self._of_rows(rows, new, mask)
        return Where(token_ids, mask[:, new], positions[:, new], roles, rows, steps, self._special_ids)

    def _of_rows(self, entries: Tensor, new: slice, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and roles of the entries of a pass, several of which may belong to one row."""
        assert self._roles is not None
        n_rows, n_new = len(entries), new.stop - new.start
        if n_rows % len(self._roles):
            raise InputError(
                "roles",
                expected=f"a number of rows that divides the batch of {n_rows}",
                received=len(self._roles),
                remedy="pass the roles of the batch that is run",
            )
        rows = entries // (n_rows // len(self._roles))
        known = self._roles.to(entries.device)[rows, new]
        beyond = known.new_full((n_rows, n_new - known.shape[1]), int(Role.RESPONSE))
        return rows, torch.cat([known, beyond], 1) * mask[:, new]


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


def as_sequence(fns: Edit | Sequence[Edit]) -> Sequence[Edit]:
    """The edits of a site as several."""
    return fns if isinstance(fns, Sequence) else (fns,)


def _mask(given: Any, n_rows: int, length: int, device: torch.device) -> Tensor:
    if given is None:
        return torch.ones(n_rows, length, dtype=torch.bool, device=device)
    if isinstance(given, Mapping):  # masks by kind of layer, made for a static cache
        return _mask(given.get("full_attention"), n_rows, length, device)
    shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
    if isinstance(given, Tensor) and given.ndim == 4 and given.shape[-1] >= length:  # what the last token attends to
        seen = given[:, 0, -1, :length]
        if seen.dtype == torch.bool or bool((seen <= 0).all()):
            return (seen if seen.dtype == torch.bool else seen == 0).expand(n_rows, -1).to(device)
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
