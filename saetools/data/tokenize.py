"""From conversations to token ids, each with its role, and to padded batches.

Roles are exact or an error. The chat template is rendered twice: with the contents as they are, and with placeholders.
The second rendering tells where the template puts each content; filling the contents in must give the first, letter by
letter. Only then are characters, and through the tokenizer's offsets tokens, given roles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from saetools.data.conversation import Conversation, Message
from saetools.data.roles import Role
from saetools.errors import InputError

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
"""A template for base models that come without one: `load_model(..., chat_template=PLAIN_CHAT_TEMPLATE)`."""

_PLACEHOLDER = "\ue000{}\ue001"  # private-use characters: no template and hardly any text holds them
_PLACEHOLDERS = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class TokenizedConversation:
    """Token ids of one conversation or one stretch of a text, with the role flags of each."""

    token_ids: Int[Tensor, " token"]
    roles: UInt8[Tensor, " token"]
    id: str
    source: str = ""

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass
class TokenizeReport:
    """Counts of a tokenising pass, filled while it runs."""

    n_conversations: int = 0
    n_tokens: int = 0
    n_truncated: int = 0
    n_tokens_cut: int = 0
    sources: dict[str, int] = field(default_factory=dict)
    """Tokens per source."""


@dataclass(frozen=True)
class Batch:
    """Conversations padded to one width.

    Args:
        token_ids: token ids; padding holds a valid id that the mask hides.
        mask: `False` at padding.
        roles: role flags, 0 at padding.
        rows: index of each row's conversation in the sequence that was batched.
    """

    token_ids: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    roles: UInt8[Tensor, "row pos"]
    rows: tuple[int, ...]

    def counted(self, *, skip_first: bool = True) -> Bool[Tensor, "row pos"]:
        """Positions that count: all but padding and, with `skip_first`, the first position (an attention sink)."""
        return self.mask & (self.mask.cumsum(1) > 1) if skip_first else self.mask


def tokenize(
    conversations: Iterable[Conversation],
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    split_texts: bool = False,
    add_generation_prompt: bool = False,
    report: TokenizeReport | None = None,
) -> Iterator[TokenizedConversation]:
    """Tokenise conversations with the tokenizer's chat template, and plain texts without it.

    Args:
        conversations: what to tokenise, one by one.
        tokenizer: a fast Hugging Face tokenizer.
        max_tokens: longer ones are cut on the right; the report counts what was cut.
        split_texts: give long plain texts as several stretches of `max_tokens` instead of cutting them; each starts
            with the tokenizer's BOS token, if it adds one.
        add_generation_prompt: end with the tokens that open the assistant's turn (for conversations that end with
            the user's).
        report: filled with counts while reading.

    Raises:
        InputError: if the tokenizer has no chat template or no offsets, or if a template changes the contents so that
            roles cannot be found exactly.
    """
    report = report if report is not None else TokenizeReport()
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "tokenizer",
            expected="a fast tokenizer (roles need character offsets)",
            received=type(tokenizer).__name__,
            remedy="load it with use_fast=True",
        )
    for conversation in conversations:
        if conversation.text is not None:
            pieces = _tokenize_text(conversation, tokenizer, max_tokens if split_texts else None)
        else:
            pieces = [_tokenize_chat(conversation, tokenizer, add_generation_prompt)]
        for piece in pieces:
            if max_tokens is not None and len(piece) > max_tokens:
                report.n_truncated += 1
                report.n_tokens_cut += len(piece) - max_tokens
                piece = TokenizedConversation(
                    piece.token_ids[:max_tokens], piece.roles[:max_tokens], piece.id, piece.source
                )
            report.n_conversations += 1
            report.n_tokens += len(piece)
            report.sources[piece.source] = report.sources.get(piece.source, 0) + len(piece)
            yield piece


def render(conversation: Conversation, tokenizer: Any, *, add_generation_prompt: bool = False) -> str:
    """The text that a chat template makes of a conversation.

    A template that knows no system role gets the system content at the head of the first user turn.

    Raises:
        InputError: if there is no template.
    """
    return _render(list(_foldable(conversation.messages, tokenizer)), tokenizer, add_generation_prompt)


def make_batches(
    conversations: Sequence[TokenizedConversation],
    *,
    batch_tokens: int = 4096,
    pad_left: bool = False,
    pad_id: int = 0,
) -> Iterator[Batch]:
    """Pad conversations of like length together.

    Args:
        conversations: what to batch; `Batch.rows` are indices into this.
        batch_tokens: padded size of a batch, at least one row.
        pad_left: pad on the left, for generation.
        pad_id: any valid token id.
    """
    by_length = sorted(range(len(conversations)), key=lambda row: -len(conversations[row]))
    start = 0
    while start < len(by_length):
        width = max(1, len(conversations[by_length[start]]))
        rows = by_length[start : start + max(1, batch_tokens // width)]
        yield pad([conversations[row] for row in rows], rows, pad_left=pad_left, pad_id=pad_id)
        start += len(rows)


def pad(
    conversations: Sequence[TokenizedConversation], rows: Sequence[int], *, pad_left: bool = False, pad_id: int = 0
) -> Batch:
    """One batch of these conversations, as wide as the longest."""
    width = max(len(conversation) for conversation in conversations)
    token_ids = torch.full((len(conversations), width), pad_id, dtype=torch.long)
    roles = torch.zeros((len(conversations), width), dtype=torch.uint8)
    for row, conversation in enumerate(conversations):
        place = slice(width - len(conversation), width) if pad_left else slice(0, len(conversation))
        token_ids[row, place] = conversation.token_ids
        roles[row, place] = conversation.roles
    return Batch(token_ids, roles != 0, roles, tuple(rows))


def _tokenize_text(conversation: Conversation, tokenizer: Any, stretch: int | None) -> Iterator[TokenizedConversation]:
    ids = tokenizer(conversation.text, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = _added_prefix(tokenizer)
    room = len(ids) if stretch is None else stretch - len(prefix)
    for start in range(0, len(ids), max(room, 1)):
        body = ids[start : start + room]
        roles = [int(Role.TEMPLATE)] * len(prefix) + [int(Role.PROMPT)] * len(body)
        name = conversation.id if stretch is None or len(ids) <= room else f"{conversation.id}@{start}"
        yield TokenizedConversation(
            torch.tensor(prefix + body), torch.tensor(roles, dtype=torch.uint8), name, conversation.source
        )


def _added_prefix(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer("a")["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    return ids[: len(ids) - len(bare)] if ids[-len(bare) :] == bare else ids[: ids.index(bare[0])]


def _tokenize_chat(conversation: Conversation, tokenizer: Any, generation: bool) -> TokenizedConversation:
    messages = list(_foldable(conversation.messages, tokenizer))
    text = _render(messages, tokenizer, generation)
    spans = _content_spans(text, messages, tokenizer, generation, conversation.id)
    marks = [int(Role.TEMPLATE)] * len(text)
    for message, (start, end) in zip(messages, spans, strict=True):
        role = Role.RESPONSE if message.role == "assistant" else Role.PROMPT
        marks[start:end] = [int(role)] * (end - start)
    answer = len(text) if generation else spans[-1][0] if messages[-1].role == "assistant" else None
    if answer is not None:
        before = messages if generation else messages[:-1]
        opening = len(_render(before, tokenizer, False)) if before else 0
        if before and not text.startswith(_render(before, tokenizer, False)):
            raise _inexact(conversation.id, "the template renders earlier turns differently once an answer follows")
        marks[opening:answer] = [int(Role.HEADER)] * (answer - opening)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    roles = [_token_role(text, marks, start, end, conversation.id) for start, end in encoded["offset_mapping"]]
    first = next(
        (i for i, (start, _) in enumerate(encoded["offset_mapping"]) if answer is not None and start >= answer), None
    )
    if answer is not None and (first is None or first > 0):
        roles[(len(roles) if first is None else first) - 1] |= int(Role.LAST_PROMPT)
    return TokenizedConversation(
        torch.tensor(encoded["input_ids"], dtype=torch.long),
        torch.tensor(roles, dtype=torch.uint8),
        conversation.id,
        conversation.source,
    )


def _token_role(text: str, marks: Sequence[int], start: int, end: int, identifier: str) -> int:
    seen = set(marks[start:end])
    if len(seen) > 1:  # white space may merge with a neighbour; the token belongs to what is not white space
        seen = {mark for mark, letter in zip(marks[start:end], text[start:end], strict=True) if not letter.isspace()}
    if len(seen) > 1:
        raise _inexact(identifier, f"the token {text[start:end]!r} holds content and template at once")
    return seen.pop() if seen else marks[min(start, len(marks) - 1)]


def _content_spans(
    text: str, messages: Sequence[Message], tokenizer: Any, generation: bool, identifier: str
) -> list[tuple[int, int]]:
    marked = [Message(message.role, _PLACEHOLDER.format(i)) for i, message in enumerate(messages)]
    frame = _PLACEHOLDERS.split(_render(marked, tokenizer, generation))
    if [int(number) for number in frame[1::2]] == list(range(len(messages))):
        for strip in (False, True):  # templates either keep the white space around a content or trim it
            spans, filled = [], frame[0]
            for message, after in zip(messages, frame[2::2], strict=True):
                content = message.content.strip() if strip else message.content
                spans.append((len(filled), len(filled) + len(content)))
                filled += content + after
            if filled == text:
                return spans
    # A template that rewrites contents (say, cuts thoughts out of earlier turns): each must still occur exactly once.
    spans, searched = [], 0
    for message in messages:
        content = message.content.strip()
        if not content or text.count(content) != 1 or text.find(content, searched) < 0:
            raise _inexact(identifier, f"the template changes or repeats the content {message.content[:60]!r}")
        searched = text.find(content) + len(content)
        spans.append((searched - len(content), searched))
    return spans


def _foldable(messages: Sequence[Message], tokenizer: Any) -> Sequence[Message]:
    if len(messages) < 2 or messages[0].role != "system":
        return messages
    try:
        _render(messages[:2], tokenizer, False)
    except InputError as error:
        if "no chat template" in str(error):
            raise
        folded = Message("user", f"{messages[0].content}\n\n{messages[1].content}")
        return (folded, *messages[2:])
    return messages


def _render(messages: Sequence[Message], tokenizer: Any, generation: bool) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise InputError(
            "tokenizer",
            expected="a chat template",
            received="no chat template, as base models have none",
            remedy="load the model with chat_template=PLAIN_CHAT_TEMPLATE or one of your own",
        )
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)
    except TemplateError as error:
        raise InputError(
            "messages",
            expected="turns that the chat template accepts",
            received=f"roles {', '.join(message.role for message in messages)} ({error})",
            remedy="change the turns or the template",
        ) from error
    return text


def _inexact(identifier: str, why: str) -> InputError:
    return InputError(
        "conversations",
        expected="a chat template from which token roles can be found exactly",
        received=f"{identifier or 'a conversation'}: {why}",
        remedy="change the conversation, or load the model with another chat_template",
    )
