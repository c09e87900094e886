"""A model under edits that passes for the Hugging Face model it is made of: for lm-eval, pipelines and servers.

Its `forward` and `generate` run the same weights, through the view's adapter and under the edits; everything else is
the model's own. Not for several threads at a time: they share the weights' hooks.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from saetools.errors import InputError
from saetools.models.editing import Edits, as_sequence, edit_passes, written_edits
from saetools.models.language_model import LanguageModel
from saetools.models.layout import is_hooked_transformer, locate
from saetools.models.passes import Passes


def steered_model(lm: LanguageModel, edits: Edits) -> Any:
    """The Hugging Face model of a view, under edits in every forward pass; costs no memory.

    An instance of the model's own class, on the same weights: `generate`, pipelines and lm-eval take it for the model.
    `generate(..., roles=batch.roles)` tells edits the token roles; which tokens are generated it knows by itself.

    Args:
        lm: the view; its adapter is active in the steered model alone.
        edits: edits per site.

    Raises:
        InputError: for a TransformerLens model, or a site that does not exist.

    Example:
        >>> v = torch.randn(576, generator=torch.Generator().manual_seed(0))
        >>> steered = steered_model(lm, {Site(15): steer.add_direction(v, 1.0).on("generated")})
        >>> ids = lm.tokenizer("Once upon a time", return_tensors="pt")
        >>> steered.generate(**ids, max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 8])
    """
    if is_hooked_transformer(lm.model):
        raise InputError(
            "lm",
            expected="a Hugging Face model",
            received="a HookedTransformer",
            remedy="use saetools.edit or saetools.hook_functions",
        )
    for site in edits:
        locate(lm.model, lm.layout, site)
    steered: Any = copy.copy(lm.model)  # a new object over the same modules
    kind: Any = type(lm.model)
    steered.__class__ = _steered_class(kind)
    steered.__dict__["_steering"] = _Steering(lm, {site: as_sequence(fns) for site, fns in edits.items()})
    return steered


class _Steering:
    """What a steered model runs under."""

    def __init__(self, lm: LanguageModel, edits: Edits) -> None:
        self.lm, self.edits = lm, edits
        self._passes = Passes(special_ids=lm.special_ids)

    @contextmanager
    def on(self) -> Iterator[None]:
        """One forward pass."""
        with self.lm.active(), edit_passes(self.lm, self.edits, self._passes):
            yield

    @contextmanager
    def given(self, roles: Tensor | None, width: int | None, mask: Tensor | None) -> Iterator[None]:
        """A generation from some tokens."""
        before = self._passes
        known = None if mask is None or mask.ndim != 2 else mask.bool()
        self._passes = Passes(roles=roles, width=width, mask=known, special_ids=self.lm.special_ids)
        try:
            with self.lm.active():  # once, not in every pass
                yield
        finally:
            self._passes = before


@functools.cache
def _steered_class(plain: Any) -> Any:
    """The class of a steered model; it bears the name of the original, by which libraries know what a model can do."""

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._steering.on():
            return plain.forward(self, *args, **kwargs)

    @functools.wraps(plain.generate)
    def generate(
        self: Any,
        inputs: Tensor | None = None,
        *args: Any,
        roles: UInt8[Tensor, "row width"] | None = None,
        **kwargs: Any,
    ) -> Any:
        first = next(
            (one for one in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if one is not None), None
        )
        width, mask = None if first is None else first.shape[1], kwargs.get("attention_mask")
        with self._steering.given(roles, width, mask):
            return plain.generate(self, inputs, *args, **kwargs)

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        raise InputError(
            "model",
            expected="a model whose weights are what it does",
            received="a steered one",
            remedy="put the edits into the weights: saetools.bake_edits",
        )

    def show(self: Any) -> str:
        return f"{plain.__name__} of {self._steering.lm!r} under {written_edits(self._steering.edits) or 'no edits'}"

    own = {"forward": forward, "generate": generate, "save_pretrained": save_pretrained, "__repr__": show}
    return type(plain.__name__, (plain,), own)
