"""A tiny model and conversations of many lengths, chats and plain texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tiny_harvest import CONVERSATIONS

from saetools.data import TokenizedConversation, tokenize
from saetools.models import LanguageModel


@pytest.fixture(scope="session")
def tiny_lm(make_tiny: Callable[..., LanguageModel]) -> LanguageModel:
    """A tiny Llama, shared: tests leave it as it was."""
    return make_tiny("llama")


@pytest.fixture(scope="session")
def tokenized(tokenizer: Any) -> list[TokenizedConversation]:
    """Chats and texts; one has a single token."""
    return list(tokenize(CONVERSATIONS, tokenizer))
