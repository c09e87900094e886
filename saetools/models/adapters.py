"""PEFT adapters on a language model: loading them, and leaving the weights as they were where that fails."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from saetools.errors import InputError
from saetools.models.foreign_errors import readable_errors
from saetools.models.language_model import LanguageModel, activate, active_adapter
from saetools.models.quiet import quiet
from saetools.provenance import sha256_of_file

Adapter = str | Path | Mapping[str, str | Path]
"""Where an adapter is (directory or hub id), or several by name."""


def with_adapters(lm: LanguageModel, adapter: Adapter) -> LanguageModel:
    """Load adapters on a model's weights; the first is the one that is seen.

    Raises:
        InputError: if there is no adapter, it does not fit the model, or its name is taken; the model is as before.
        FetchError: if files cannot be downloaded.
    """
    named = dict(adapter) if isinstance(adapter, Mapping) else {_adapter_name(adapter): adapter}
    if not named:
        raise InputError("adapter", expected="at least one adapter", received="{}", remedy="give a path, or None")
    peft, hashes = lm.peft, dict(lm.provenance.get("adapters", {}))
    for name, place in named.items():
        path = Path(place).expanduser()
        if path.exists() and not (path / "adapter_config.json").is_file():
            raise InputError(
                "adapter",
                expected="a PEFT adapter folder with adapter_config.json",
                received=str(path),
                remedy="point at the folder that save_pretrained of PEFT wrote",
            )
        if name in getattr(lm.model, "peft_config", ()):
            raise InputError("adapter", expected="new names", received=repr(name), remedy="load it under another name")
        peft = _load_adapter(lm.model, peft, name, str(path if path.is_dir() else place))
        weights = path / "adapter_model.safetensors"
        hashes[name] = {"source": path.name if path.is_dir() else str(place)} | (
            {"weights_sha256": sha256_of_file(weights)} if weights.is_file() else {}
        )
    peft.eval()
    return replace(lm, peft=peft, adapter=next(iter(named)), provenance={**lm.provenance, "adapters": hashes})


@contextmanager
def borrowed_adapter(lm: LanguageModel, place: str | Path) -> Iterator[LanguageModel]:
    """Load an adapter on a model's weights under a name of its own, hand out that view, and take it out again.

    Args:
        lm: the model; its other views stay as they are.
        place: a PEFT adapter folder, or a hub id.

    Raises:
        InputError: if there is no adapter there, or it does not fit the model.
        FetchError: if files cannot be downloaded.
    """
    name = next(
        f"borrowed_{number}" for number in range(len(lm.adapters) + 1) if f"borrowed_{number}" not in lm.adapters
    )
    before = active_adapter(lm.model)
    view = with_adapters(lm, {name: place})
    try:
        yield view
    finally:
        _discard_adapter(lm.model, name)
        if before is not None:  # PEFT may have chosen another one of those that are left
            activate(lm.model, before)


@contextmanager
def scaled_adapter(lm: LanguageModel, scale: float) -> Iterator[LanguageModel]:
    """Multiply what the adapter of this view adds to the weights, for as long as the block lasts.

    Views share their weights: inside the block every view through this adapter is scaled.

    Args:
        lm: the view.
        scale: 0 is the model without the adapter, 1 the adapter as it is; others go beyond or against it.

    Raises:
        InputError: for a view without adapter, one whose contribution is not a LoRA's sum, or a scale that is not
            finite.
    """
    layers = _scalable_layers(lm)
    if not math.isfinite(scale):
        raise InputError("scale", expected="a finite number", received=scale, remedy="1 is the adapter as it is")
    before = [(layer, name, layer.scaling[name]) for layer, name in layers]
    try:
        for layer, name, own in before:
            layer.scaling[name] = own * scale
        yield lm
    finally:
        for layer, name, own in before:
            layer.scaling[name] = own


def _scalable_layers(lm: LanguageModel) -> list[tuple[Any, str]]:
    """Every LoRA layer of a view's adapters, with the adapter's name.

    Raises:
        InputError: if the view has no adapter, or its adapters change anything but by a scaled sum.
    """
    if lm.adapter is None:
        raise InputError("lm", expected="a view through an adapter", received="the model without", remedy="pass tuned")
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    names = lm.adapter.split("+")
    configs = [getattr(lm.model, "peft_config", {})[name] for name in names]
    modules = list(lm.model.modules())
    for unfit, what in (
        (any(config.peft_type != "LORA" for config in configs), "another kind of adapter"),
        (any(getattr(config, "use_dora", False) for config in configs), "DoRA, which rescales the weights themselves"),
        (any(getattr(config, "bias", "none") != "none" for config in configs), "biases of its own"),
        (
            any(isinstance(one, AuxiliaryTrainingWrapper) and set(names) & set(one._adapters) for one in modules),
            "whole layers of its own",
        ),
    ):
        if unfit:
            raise InputError("lm", expected="a LoRA adapter", received=what, remedy="pass one that adds and no more")
    tuned = [one for one in modules if isinstance(one, BaseTunerLayer) and isinstance(one, LoraLayer)]
    return [(layer, name) for layer in tuned for name in names if name in layer.scaling]


def without_peft(peft: Any) -> nn.Module:
    """The causal LM inside a PEFT wrapper.

    Raises:
        InputError: for adapters that are virtual tokens.
    """
    from peft.tuners.tuners_utils import BaseTuner

    if not isinstance(peft.base_model, BaseTuner):
        raise InputError(
            "adapter",
            expected="an adapter that changes layers, such as LoRA",
            received=", ".join(config.peft_type for config in peft.peft_config.values()),
            remedy="use another kind of adapter: virtual tokens would shift every position",
        )
    model: nn.Module = peft.get_base_model()
    return model


def _load_adapter(model: nn.Module, peft: Any, name: str, location: str) -> Any:
    from peft import PeftModel

    with quiet(), readable_errors("adapter", location):
        try:
            if peft is None:
                peft = PeftModel.from_pretrained(model, location, adapter_name=name)
            without_peft(peft)
            # Also after from_pretrained, which does not say what was missing; such an adapter would change nothing.
            report = peft.load_adapter(location, adapter_name=name)
            if missing := [key for key in report.missing_keys if f".{name}." in key]:
                raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
        except Exception:
            _discard_adapter(model, name)
            raise
    return peft


def _discard_adapter(model: Any, name: str) -> None:
    """Take a half-loaded adapter out of a causal LM again, and all of PEFT with the last one."""
    from peft.functional import delete_adapter
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if name not in getattr(model, "peft_config", ()):
        return
    kind = model.peft_config.pop(name).peft_type
    if model.peft_config:
        delete_adapter(model, name, PEFT_TYPE_TO_PREFIX_MAPPING[kind])
        return
    del model.peft_config
    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(path, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            model.set_submodule(path, module.original_module)


def _adapter_name(place: str | Path) -> str:
    return re.sub(r"\W+", "_", Path(place).name) or "adapter"
