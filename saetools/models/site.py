"""Where in a language model a residual-stream activation is read or edited."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from saetools.errors import InputError

Stream = Literal["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
STREAMS: tuple[Stream, ...] = get_args(Stream)  # in the order in which a layer computes them

_NAME = re.compile(r"blocks\.(\d+)\.hook_(\w+)")


@dataclass(frozen=True)
class Site:
    """One stream of one layer, named and printed as TransformerLens names it.

    `attn_out` and `mlp_out` are what is added to the residual stream (after Gemma's post-norms); `resid_mid` lies
    between attention and MLP. Sites order as a forward pass reaches them.

    Args:
        layer: index of the decoder layer, from 0.
        stream: `resid_pre`, `attn_out`, `resid_mid`, `mlp_out` or `resid_post`.

    Raises:
        InputError: for a negative layer or an unknown stream.

    Example:
        >>> str(Site(15, "resid_post"))
        'blocks.15.hook_resid_post'
        >>> Site.parse("blocks.3.hook_mlp_out")
        Site(layer=3, stream='mlp_out')
    """

    layer: int
    stream: Stream = "resid_post"

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise InputError("layer", expected="0 or more", received=self.layer, remedy="count layers from 0")
        if self.stream not in STREAMS:
            raise InputError(
                "stream",
                expected="one of " + ", ".join(STREAMS),
                received=repr(self.stream),
                remedy="pick one of these",
            )

    @classmethod
    def parse(cls, name: str) -> Site:
        """Read a TransformerLens hook name, such as `blocks.15.hook_resid_post`.

        Raises:
            InputError: if the name has another form.
        """
        match = _NAME.fullmatch(name)
        if match is None or match[2] not in STREAMS:
            raise InputError(
                "site",
                expected="blocks.<layer>.hook_<" + "|".join(STREAMS) + ">",
                received=repr(name),
                remedy="name a residual-stream hook of TransformerLens",
            )
        return cls(int(match[1]), match[2])

    def __str__(self) -> str:
        return f"blocks.{self.layer}.hook_{self.stream}"

    def __lt__(self, other: Site) -> bool:
        return (self.layer, STREAMS.index(self.stream)) < (other.layer, STREAMS.index(other.stream))


FIRST_SITE = Site(0, STREAMS[0])
