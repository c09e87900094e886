"""From conversations to token ids, each with its role, and to padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from saetools.data.conversation import Conversation
from saetools.data.roles import Role
from saetools.data.template import ChatTemplate, ChatText, added_prefix, inexact
from saetools.errors import InputError
from saetools.provenance import sha256_of_texts

_CHUNK_CHARACTERS = 200_000


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

    def count(self, piece: TokenizedConversation, n_cut: int) -> None:
        """Count a conversation, or a stretch of a text, that lost `n_cut` tokens."""
        self.n_conversations += 1
        self.n_tokens += len(piece)
        self.n_truncated += n_cut > 0
        self.n_tokens_cut += n_cut
        self.sources[piece.source] = self.sources.get(piece.source, 0) + len(piece)


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
        max_tokens: longer ones are cut on the right, and the report counts what was cut; with `add_generation_prompt`,
            where a cut would take away what opens the answer, they are an error.
        split_texts: give long plain texts as several stretches of `max_tokens` instead of cutting them; each starts
            with the tokenizer's BOS token, if it adds one.
        add_generation_prompt: end with the tokens that open the assistant's turn (for conversations that end with
            the user's).
        report: filled with counts while reading.

    Raises:
        InputError: if the tokenizer has no chat template or no offsets, if a template refuses the turns, or changes
            them so that roles cannot be found exactly.
    """
    report = report if report is not None else TokenizeReport()
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "tokenizer",
            expected="a fast tokenizer (roles need character offsets)",
            received=type(tokenizer).__name__,
            remedy="load it with use_fast=True",
        )
    prefix = added_prefix(tokenizer)
    if split_texts if max_tokens is None else max_tokens <= len(prefix):
        raise InputError(
            "max_tokens",
            expected=f"more than {len(prefix)} tokens" if max_tokens is not None else "a length to split texts at",
            received=max_tokens,
            remedy="give the length of a context",
        )
    template: ChatTemplate | None = None
    for chunk in _chunks(conversations):
        if template is None and any(conversation.text is None for conversation in chunk):
            template = ChatTemplate(tokenizer)
        chats = [
            None
            if template is None or conversation.text is not None
            else template.read(conversation, generation=add_generation_prompt)
            for conversation in chunk
        ]
        for piece in _encode(chunk, chats, tokenizer, prefix, max_tokens if split_texts else None):
            n_cut = max(0, len(piece) - max_tokens) if max_tokens is not None else 0
            if n_cut and add_generation_prompt:
                raise InputError(
                    "conversations",
                    expected=f"prompts of at most max_tokens={max_tokens}",
                    received=f"{piece.id or 'one'} with {len(piece)}",
                    remedy="shorten it, or raise max_tokens",
                )
            if n_cut:
                piece = replace(piece, token_ids=piece.token_ids[:max_tokens], roles=piece.roles[:max_tokens])
            report.count(piece, n_cut)
            yield piece


def require_tokenized(conversations: Sequence[TokenizedConversation]) -> None:
    """Refuse conversations that are not tokenised yet.

    Raises:
        InputError: if the first one is not.
    """
    if conversations and not isinstance(conversations[0], TokenizedConversation):
        raise InputError(
            "conversations",
            expected="tokenised conversations",
            received=type(conversations[0]).__name__,
            remedy="pass list(tokenize(conversations, lm.tokenizer))",
        )


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

    Raises:
        InputError: if they are not tokenised.
    """
    require_tokenized(conversations)
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


def _chunks(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    """Enough text to keep all cores of the tokenizer busy, little enough to stream."""
    chunk: list[Conversation] = []
    size = 0
    for conversation in conversations:
        if not isinstance(conversation, Conversation):
            raise InputError(
                "conversations",
                expected="Conversation objects",
                received=type(conversation).__name__,
                remedy="use Conversation.chat(...), Conversation(text=...) or read_conversations(...)",
            )
        chunk.append(conversation)
        size += 100 + len(conversation.text or "") + sum(len(message.content) for message in conversation.messages)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(
    chunk: Sequence[Conversation],
    chats: Sequence[ChatText | None],
    tokenizer: Any,
    prefix: list[int],
    stretch: int | None,
) -> Iterator[TokenizedConversation]:
    """Encode chats and texts together, which lets the tokenizer use all cores."""
    texts = [chat.text if chat else conversation.text for chat, conversation in zip(chats, chunk, strict=True)]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    for row, (conversation, chat) in enumerate(zip(chunk, chats, strict=True)):
        ids = encoded["input_ids"][row]
        if not ids:
            name = conversation.id or "one without"
            raise InputError("conversations", expected="text that has tokens", received=name, remedy="drop it")
        if chat is None:
            yield from _text_pieces(conversation, ids, prefix, stretch)
        else:
            roles = torch.from_numpy(_token_roles(conversation, chat, encoded.encodings[row].offsets))
            yield TokenizedConversation(torch.tensor(ids), roles, conversation.id, conversation.source)


def _text_pieces(
    conversation: Conversation, ids: list[int], prefix: list[int], stretch: int | None
) -> Iterator[TokenizedConversation]:
    room = len(ids) if stretch is None else stretch - len(prefix)
    for start in range(0, len(ids), room):
        body = ids[start : start + room]
        roles = np.repeat(np.array([Role.TEMPLATE, Role.PROMPT], dtype=np.uint8), [len(prefix), len(body)])
        name = conversation.id if len(ids) <= room else f"{conversation.id}@{start}"
        yield TokenizedConversation(torch.tensor(prefix + body), torch.from_numpy(roles), name, conversation.source)


def _token_roles(
    conversation: Conversation, chat: ChatText, offsets: Sequence[tuple[int, int]]
) -> UInt8[np.ndarray, " token"]:
    """The role of each token's characters.

    White space may merge with a neighbour: a token that holds characters of several roles has the role of those that
    are not white space and, if all are, of the first.
    """
    starts, ends = np.array(offsets, dtype=np.int64).T
    # Offsets may leave spaces out, but a token starts where the last one ended.
    starts = np.minimum(starts, np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]))
    roles: UInt8[np.ndarray, " token"] = chat.roles[np.minimum(starts, len(chat.text) - 1)]
    changes = np.flatnonzero(np.diff(chat.roles)) + 1
    mixed = np.searchsorted(changes, starts, "right") < np.searchsorted(changes, ends, "left")
    for token in np.flatnonzero(mixed):
        span = slice(starts[token], ends[token])
        seen = {role for role, letter in zip(chat.roles[span], chat.text[span], strict=True) if not letter.isspace()}
        if len(seen) > 1:
            raise inexact(conversation, f"the token {chat.text[span]!r} holds characters of several roles")
        roles[token] = seen.pop() if seen else roles[token]
    if chat.answer is not None:
        response = np.flatnonzero((roles == Role.RESPONSE) & (ends > chat.answer))
        n_before = response[0] if len(response) else np.count_nonzero(starts < chat.answer)
        if n_before:
            roles[n_before - 1] |= int(Role.LAST_PROMPT)
    return roles


def tokens_sha256(conversations: Iterable[TokenizedConversation], name: Literal["token_ids", "roles"]) -> str:
    """Hash of the token ids, or of the roles, of conversations in their order."""
    return sha256_of_texts(np.asarray(getattr(one, name)).tobytes().hex() for one in conversations)
