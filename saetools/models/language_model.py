"""A causal language model with its tokenizer, and views of it under different adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from saetools.errors import InputError
from saetools.models.layout import Layout, head_of, is_hooked_transformer, layout_of, submodule


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal LM, its tokenizer and, with PEFT, the adapter through which this view looks at the weights.

    Base and tuned model are two views of one set of weights: `tuned.base` costs no memory. Make one with
    `load_model`.

    Args:
        model: the causal LM itself (never its PEFT wrapper), in eval mode: Hugging Face, or TransformerLens'
            `HookedTransformer`.
        tokenizer: its Hugging Face tokenizer.
        name: how results call this model.
        peft: the PEFT wrapper around `model`, through which adapters were loaded.
        adapter: name of the adapter of this view; `None` is the model without any, also after others are loaded.
        provenance: where weights, adapter and tokenizer came from, for results.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    peft: Any = None
    adapter: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """Where this architecture keeps what."""
        return layout_of(self.model)

    @property
    def backbone(self) -> nn.Module:
        """The module that receives token ids, attention mask and cache."""
        return submodule(self.model, self.layout.backbone)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, first to last."""
        return submodule(self.model, self.layout.layers)  # type: ignore[return-value]

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last layer and the head."""
        return submodule(self.model, self.layout.norm)

    @property
    def head(self) -> nn.Module:
        """The map from the normalised residual to logits."""
        return head_of(self.model)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        model: Any = self.model
        return int(model.cfg.d_model if is_hooked_transformer(model) else model.config.get_text_config().hidden_size)

    @property
    def n_context(self) -> int | None:
        """Longest context, in tokens; `None` if the configuration does not say."""
        model: Any = self.model
        if is_hooked_transformer(model):
            return int(model.cfg.n_ctx)
        return getattr(model.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of the tokenizer's special tokens."""
        return tuple(self.tokenizer.all_special_ids)

    def check_length(self, n_tokens: int, *, argument: str) -> None:
        """Refuse what is longer than the context: positions beyond it have no meaning to the model.

        Raises:
            InputError: naming the argument.
        """
        if self.n_context is not None and n_tokens > self.n_context:
            raise InputError(
                argument,
                expected=f"at most {self.n_context} tokens, the context of {self.name}",
                received=n_tokens,
                remedy="cut or split texts with max_tokens, or ask for shorter answers",
            )

    @property
    def logit_cap(self) -> float | None:
        """Bound of the soft-capped logits, where the architecture has one."""
        model: Any = self.model
        if is_hooked_transformer(model):
            return model.cfg.output_logits_soft_cap if model.cfg.output_logits_soft_cap > 0 else None
        return getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    @property
    def device(self) -> torch.device:
        """Where token ids have to be."""
        return next(self.model.parameters()).device

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters loaded on these weights."""
        return tuple(getattr(self.model, "peft_config", ()))

    @property
    def base(self) -> LanguageModel:
        """The same weights without any adapter."""
        return replace(self, adapter=None)

    def describe(self) -> dict[str, Any]:
        """What a result says of the model that it is about: name, adapter, hashes."""
        return {"name": self.name, "adapter": self.adapter, **self.provenance}

    def with_adapter(self, name: str) -> LanguageModel:
        """The same weights seen through another loaded adapter.

        Raises:
            InputError: if no adapter of that name is loaded.
        """
        if name not in self.adapters:
            raise InputError(
                "name",
                expected="one of the loaded adapters " + (", ".join(self.adapters) or "(none)"),
                received=repr(name),
                remedy="load it: load_model(..., adapter={name: path})",
            )
        return replace(self, adapter=name)

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """Make the shared weights behave as this view, and hand out the causal LM; afterwards as before.

        Everything that runs the model goes through here; entering a view that is already active is free.
        """
        before = active_adapter(self.model)
        if before is None or before.seen == self.adapter:
            yield self.model
            return
        activate(self.model, ActiveAdapter(self.adapter or before.selected, disabled=self.adapter is None))
        try:
            yield self.model
        finally:
            activate(self.model, before)

    def __repr__(self) -> str:
        adapter = f", adapter={self.adapter!r}" if self.adapters else ""
        return f"LanguageModel({self.name!r}, {type(self.model).__name__}{adapter}, d_model={self.d_model})"


@dataclass(frozen=True)
class ActiveAdapter:
    """Which adapter (or several, joined by `+`) PEFT has selected on a model, and whether it is switched off."""

    selected: str
    disabled: bool

    @property
    def seen(self) -> str | None:
        """What a forward pass sees."""
        return None if self.disabled else self.selected


def active_adapter(model: nn.Module) -> ActiveAdapter | None:
    """What PEFT has selected on a causal LM; `None` if no adapters are injected."""
    if not getattr(model, "peft_config", None):
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer: Any = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return ActiveAdapter("+".join(layer.active_adapters), disabled=layer.disable_adapters)


def activate(model: nn.Module, wanted: ActiveAdapter) -> None:
    """Make PEFT select an adapter on a causal LM, on or off; what needs gradients stays as it is."""
    from peft.functional import set_adapter
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    set_adapter(model, wanted.selected.split("+"))
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            module.enable_adapters(not wanted.disabled)
    for parameter, requires_grad in flags:  # PEFT switches gradients with adapters; a change of view must not
        parameter.requires_grad_(requires_grad)
