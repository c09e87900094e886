"""Tokenizers for tests of the data package: the built-in model's, under any template."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from chat_templates import BOS, EOS, SMOLLM2, SPECIAL

from saetools.models.builtin import fetch_builtin


@pytest.fixture(scope="session")
def smollm_folder() -> Path:
    return fetch_builtin("smollm2-135m")


@pytest.fixture(scope="session")
def make_tokenizer(smollm_folder: Path) -> Callable[..., Any]:
    """`make_tokenizer(template)`: the built-in model's tokens and some special ones under another template.

    With `inst`, `[INST]` and `[/INST]` are special too; with `adds_bos`, plain texts get a BOS; with `trims_offsets`,
    offsets leave out the spaces of tokens, as those of GPT-2 and Llama 3 do.
    """
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    @cache
    def load(inst: bool, adds_bos: bool, trims_offsets: bool) -> Any:
        inner = Tokenizer.from_file(str(smollm_folder / "tokenizer.json"))
        inner.add_special_tokens([EOS, *SPECIAL, *(["[INST]", "[/INST]"] if inst else [])])
        steps: list[Any] = [processors.ByteLevel(trim_offsets=True)] if trims_offsets else []
        if adds_bos:
            steps.append(processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)]))
        inner.post_processor = processors.Sequence(steps)
        return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=BOS, eos_token=EOS)

    def make(
        template: str | None = SMOLLM2, *, inst: bool = False, adds_bos: bool = False, trims_offsets: bool = False
    ) -> Any:
        tokenizer = copy(load(inst, adds_bos, trims_offsets))
        tokenizer.chat_template = template
        return tokenizer

    return make
