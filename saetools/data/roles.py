"""What part a token plays in a conversation."""

from __future__ import annotations

from enum import IntFlag
from typing import Literal, get_args

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from saetools.errors import InputError

Positions = Literal["prompt", "last_prompt", "header", "response", "template", "all"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)


class Role(IntFlag):
    """Flags of one token; padding has none.

    Every token has exactly one of `TEMPLATE`, `PROMPT`, `HEADER` and `RESPONSE`; the token just before the first token
    of the final answer has `LAST_PROMPT` as well.
    """

    TEMPLATE = 1
    """Template, BOS and end-of-turn tokens, and a system prompt that the template injects."""
    PROMPT = 2
    """System and user content as given; all of a plain text."""
    HEADER = 4
    """The tokens that open the final assistant turn."""
    RESPONSE = 8
    """Assistant content."""
    LAST_PROMPT = 16
    """The token before the first response token."""


def select_positions(roles: UInt8[Tensor, "*shape"], positions: Positions) -> Bool[Tensor, "*shape"]:
    """Where tokens of a role stand; `all` is everything but padding.

    Args:
        roles: `Role` flags.
        positions: `prompt`, `last_prompt`, `header`, `response`, `template` or `all`.

    Raises:
        InputError: for another name.
    """
    if positions not in POSITIONS:
        raise InputError(
            "positions",
            expected="one of " + ", ".join(POSITIONS),
            received=repr(positions),
            remedy="pick one of these token roles",
        )
    if positions == "all":
        return roles != 0
    return torch.bitwise_and(roles, int(Role[positions.upper()])) != 0
