"""Which tokens an edit touches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from saetools.data.roles import Positions, select_positions
from saetools.errors import InputError
from saetools.models.where import Where

Tokens = Literal["all", "prompt", "last_prompt", "header", "response", "template", "generated"]
TOKENS: tuple[Tokens, ...] = get_args(Tokens)


@dataclass(frozen=True)
class Scope:
    """Which tokens an edit touches; padding never.

    Args:
        tokens: token roles, as in a diff; `all`; or `generated`: tokens after those that the model was given. Of
            several, tokens that have any of them.
        start: the first token of each row that counts, from 0, not counting padding.
        skip_first: leave the first token of each row alone, an attention sink; a paper's "all positions" is `False`.
        skip_special: leave the tokenizer's special tokens alone.
    """

    tokens: tuple[Tokens, ...] = ("all",)
    start: int = 0
    skip_first: bool = True
    skip_special: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.tokens if name not in TOKENS]
        if unknown or not self.tokens:
            raise InputError(
                "tokens",
                expected="some of " + ", ".join(TOKENS),
                received=repr(unknown[0]) if unknown else "none",
                remedy="pick one of these",
            )
        if self.start < 0:
            raise InputError("start", expected="0 or more", received=self.start, remedy="count from the first token")

    def __call__(self, where: Where) -> Bool[Tensor, "row pos"]:
        """The tokens of a pass that are to be edited.

        Raises:
            InputError: for roles, generated or special tokens where these are not known.
        """
        chosen = where.mask
        if (start := max(self.start, int(self.skip_first))) > 0:
            chosen = chosen & (where.positions >= start)
        if self.skip_special:
            chosen = chosen & ~where.special
        if "all" in self.tokens:
            return chosen
        wanted = torch.zeros_like(chosen)
        for name in self.tokens:
            wanted |= where.generated if name == "generated" else _of_role(where, name)
        return chosen & wanted

    def __str__(self) -> str:
        """The modifiers of a written edit, such as `on response from 3`; nothing for the default."""
        words = [] if self.tokens == ("all",) else ["on " + ",".join(self.tokens)]
        words += [f"from {self.start}"] if self.start else []
        words += ["with first"] if not self.skip_first else []
        words += ["without special"] if self.skip_special else []
        return " ".join(words)


def _of_role(where: Where, role: Positions) -> Tensor:
    if where.roles is None:
        raise InputError(
            "tokens",
            expected="'all', or the roles of the batch",
            received=f"{role!r} without roles",
            remedy="pass roles=batch.roles where edits are switched on",
        )
    return select_positions(where.roles, role)
