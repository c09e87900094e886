"""Following the forward passes of a model: which tokens each of them runs, under padding and any cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor, nn

from saetools.data.roles import Role
from saetools.errors import InputError
from saetools.models.language_model import LanguageModel
from saetools.models.layout import submodule
from saetools.models.where import Edit, Where


class Passes:
    """Knows where the activations of the forward pass stand that is running, and edits them.

    Args:
        roles: of the batch that is run.
        width: tokens in a row of it, padding included.
        mask: `False` at its padding, for passes whose own mask does not tell.
        special_ids: of the tokenizer.

    Raises:
        InputError: if these do not go together.
    """

    def __init__(
        self,
        *,
        roles: UInt8[Tensor, "row width"] | None = None,
        width: int | None = None,
        mask: Bool[Tensor, "row width"] | None = None,
        special_ids: tuple[int, ...] | None = None,
    ) -> None:
        widths = {width, *(one.shape[1] for one in (roles, mask) if one is not None)} - {None}
        if len(widths) > 1:
            raise InputError(
                "width",
                expected="that of the roles and of the mask",
                received=sorted(map(str, widths)),
                remedy="pass one of them",
            )
        self._roles, self._given_mask = roles, mask
        self._width = widths.pop() if widths else None
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
        mask = self._mask(call.get("attention_mask"), n_rows, start + n_new, shaped.device)
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

    def _mask(self, told: Any, n_rows: int, length: int, device: torch.device) -> Bool[Tensor, "row past_and_pos"]:
        """Where tokens are, by what the model is told of it, or what we are."""
        if isinstance(told, Mapping):  # masks by kind of layer, made for a static cache
            told = told.get("full_attention", next(iter(told.values()), None))
        if told is None and self._given_mask is None:
            return torch.ones(n_rows, length, dtype=torch.bool, device=device)
        if isinstance(told, Tensor) and told.ndim == 2 and len(told) == n_rows and told.shape[1] >= length:
            return told[:, :length].to(device).bool()
        given = self._given_mask
        if given is not None and n_rows % len(given) == 0:
            known = given.to(device).repeat_interleave(n_rows // len(given), 0)[:, :length]
            return torch.nn.functional.pad(known, (0, length - known.shape[1]), value=True)
        if isinstance(told, Tensor) and told.ndim == 4 and told.shape[-1] >= length:  # what the last token attends to
            seen = told[:, 0, -1, :length]
            if seen.dtype == torch.bool or bool((seen <= 0).all()):
                return (seen if seen.dtype == torch.bool else seen == 0).expand(n_rows, -1).to(device)
        raise InputError(
            "attention_mask",
            expected=f"shape ({n_rows}, {length}), over cached and new tokens",
            received=tuple(told.shape) if isinstance(told, Tensor) else type(told).__name__,
            remedy="pass the two-dimensional mask, or run saetools.steered_model where a cache makes another",
        )

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


def _cache_length(call: Mapping[str, Any]) -> int:
    if (cache := call.get("past_key_values")) is not None:
        return int(cache.get_seq_length())
    if (entry := call.get("past_kv_cache_entry")) is not None:  # TransformerLens has one per layer
        return int(entry.past_keys.shape[1])
    return 0


def _checked(new: Any, acts: Tensor) -> Tensor:
    if not isinstance(new, Tensor) or new.shape != acts.shape:
        raise InputError(
            "edits",
            expected=f"an edit that returns activations of shape {tuple(acts.shape)}",
            received=tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__,
            remedy="return all activations that were given, edited or not",
        )
    return new.to(acts.dtype)
