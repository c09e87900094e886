"""Which tokens an edit sees: one forward pass of a batch, maybe continuing a KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from saetools.errors import InputError


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
