"""Asking a model, over the network or in this process, until its answer can be read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from saetools.data.conversation import Conversation, Message
from saetools.endpoint import AnswerError, ChatSession, Endpoint, Reply, Spending
from saetools.errors import InputError
from saetools.generation import SamplingConfig, generate
from saetools.interpret.prompts import MalformedError
from saetools.models.language_model import LanguageModel

T = TypeVar("T")
Ask = Callable[[str, int, int], Reply]
"""Takes a prompt, the longest answer in tokens, and the number of the attempt, from 0."""

_TEMPERATURE = 0.7  # of another attempt; the first is greedy, and would come out the same again


@contextmanager
def answering(explainer: Endpoint | LanguageModel, spending: Spending) -> Iterator[Ask]:
    """A function that asks an explainer, as long as the block lasts.

    Args:
        explainer: an endpoint, or a model with a chat template that is run here.
        spending: what its requests are counted by.
    """
    if isinstance(explainer, LanguageModel):
        yield _local(explainer, spending)
        return
    with ChatSession(explainer, spending=spending) as session:

        def ask(prompt: str, max_tokens: int, attempt: int) -> Reply:
            return session.ask([Message("user", prompt)], max_tokens=max_tokens, temperature=_temperature(attempt))

        yield ask


def describe(explainer: Endpoint | LanguageModel) -> dict[str, Any]:
    """What a result says of its explainer."""
    if isinstance(explainer, Endpoint):
        return explainer.describe()
    return {"model": explainer.name, "adapter": explainer.adapter, **explainer.provenance}


def ask_until_valid(ask: Ask, prompt: str, parse: Callable[[str], T], *, max_tokens: int, max_attempts: int) -> T:
    """Ask, and ask again while the answer cannot be read.

    Args:
        ask: of `answering`.
        prompt: the question.
        parse: what reads an answer, or raises `MalformedError`.
        max_tokens: longest answer.
        max_attempts: how often to ask; the first time greedily, then at a temperature of 0.7.

    Raises:
        AnswerError: if no answer came, or none that could be read; with the last reason.
    """
    reason = ""
    for attempt in range(max_attempts):
        reply = ask(prompt, max_tokens, attempt)
        try:
            return parse(reply.text)
        except MalformedError as error:
            reason = f"{error}{f' (cut off at {max_tokens} tokens)' if reply.cut_off else ''}"
    raise AnswerError(f"malformed in {max_attempts} attempts, the last time {reason}")


def _local(lm: LanguageModel, spending: Spending) -> Ask:
    special = [token for token in lm.tokenizer.all_special_tokens if len(token) > 1]
    found = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def ask(prompt: str, max_tokens: int, attempt: int) -> Reply:
        # Tokenizers read special tokens also where they are quoted; a zero-width space makes plain text of them.
        prompt = found.sub(lambda token: f"{token[0][0]}\u200b{token[0][1:]}", prompt)
        spending.begin()
        config = SamplingConfig(max_tokens, temperature=_temperature(attempt), seed=attempt)
        try:
            (answer,) = generate(lm, [Conversation.chat(prompt)], config=config)
        except InputError as error:  # longer than the model's context
            raise AnswerError(str(error)) from error
        n_prompt = len(lm.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        reply = Reply(answer.text, not answer.finished, n_prompt + len(answer.token_ids))
        spending.end(reply)
        return reply

    return ask


def _temperature(attempt: int) -> float:
    return 0.0 if attempt == 0 else _TEMPERATURE
