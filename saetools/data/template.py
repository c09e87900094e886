"""Chat templates: the text that one makes of a conversation, and which of its characters are whose.

Exact or an error. A template is rendered with the contents as they are and, once for each sequence of roles, with a
placeholder for each content. The second rendering is a frame; the contents filled into it must give the first, letter
by letter. Some templates take contents apart at tags, as Qwen3's cuts the thoughts between `<think>` and `</think>` out
of earlier turns. Then the stretches between tags get a placeholder each, and the same must hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from saetools.data.conversation import Conversation, Message
from saetools.data.roles import Role
from saetools.errors import InputError

PLAIN_CHAT_TEMPLATE = (
    "{{ added_bos }}{% for message in messages %}"
    "{{ message['role'].capitalize() + ': ' + message['content'] + '\\n\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""A template for base models that come without one: `load_model(..., chat_template=PLAIN_CHAT_TEMPLATE)`.

Templates get the BOS token as `added_bos` if the tokenizer puts one before plain texts, else nothing.
"""

TEMPLATE_DATE = date(2024, 7, 26)
"""What templates that write today's date are given, so that equal conversations have equal tokens every day.

It is the one that Llama 3's template has for want of a clock.
"""

_TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_PLACEHOLDER = "\ue000{}\ue001"  # private-use characters, which no template holds
_PLACEHOLDERS = re.compile("\ue000(\\d+)\ue001")
_TAGS = re.compile(r"(<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\])")


@dataclass(frozen=True, eq=False)
class ChatText:
    """What a template makes of a conversation.

    Args:
        text: the whole text.
        roles: the role of each character.
        answer: where the final answer starts, or would start; `None` if no assistant's turn is open.
    """

    text: str
    roles: UInt8[np.ndarray, " char"]
    answer: int | None


class _Span(NamedTuple):
    """Characters `start` to `end` of a text are content of message `number`."""

    start: int
    end: int
    number: int


class _Stretch(NamedTuple):
    """Content of message `number` that has no tag inside, and the tags at its sides."""

    number: int
    text: str
    tags_before: list[str]
    tags_after: list[str]


class ChatTemplate:
    """A tokenizer's chat template and the frames that it puts around contents.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Raises:
        InputError: if it has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise InputError(
                "tokenizer",
                expected="a chat template",
                received="no chat template, as base models have none",
                remedy="load the model with chat_template=PLAIN_CHAT_TEMPLATE or one of your own",
            )
        self._tokenizer = tokenizer
        self._template = _TODAY.sub(
            lambda call: json.dumps(TEMPLATE_DATE.strftime(call[2])), tokenizer.get_chat_template()
        )
        self._added_bos = "".join(tokenizer.convert_ids_to_tokens(added_prefix(tokenizer)))
        self._frames: dict[tuple[tuple[str, ...], bool], list[str]] = {}

    def render(self, conversation: Conversation, *, generation: bool = False) -> str:
        """The text of a conversation; a system content goes to the head of the user's turn if the template takes none.

        Args:
            conversation: a chat.
            generation: end with the tokens that open the assistant's turn.

        Raises:
            InputError: if the template refuses the turns.
        """
        messages = conversation.messages
        if [message.role for message in messages[:2]] == ["system", "user"] and not self._takes_system:
            folded = Message("user", f"{messages[0].content}\n\n{messages[1].content}")
            conversation = replace(conversation, messages=(folded, *messages[2:]))
        return self._render(conversation, generation)

    def read(self, conversation: Conversation, *, generation: bool = False) -> ChatText:
        """The text of a conversation with the role of each character.

        Roles follow from what the template was given, not from what a text looks like: a user who writes
        `<|im_end|>` has written user content, though the tokenizer makes an end-of-turn token of it.

        Raises:
            InputError: if the template refuses the turns, or changes them so that roles cannot be found exactly; if
                there is an answer already where one is to be generated.
        """
        messages = conversation.messages
        answered = messages[-1].role == "assistant"
        if generation and answered:
            raise InputError(
                "conversations",
                expected="prompts, as add_generation_prompt asks for",
                received=f"{_name(conversation)}, which ends with an answer",
                remedy="drop the answer",
            )
        text = self.render(conversation, generation=generation)
        spans = self._spans_in_frame(text, messages, generation) or self._spans_between_tags(
            text, conversation, generation
        )
        roles = np.full(len(text), int(Role.TEMPLATE), dtype=np.uint8)
        for start, end, number in spans:
            roles[start:end] = int(Role.RESPONSE if messages[number].role == "assistant" else Role.PROMPT)
        answer = None
        if generation:
            answer = len(text)
        elif answered:
            answer = min((span.start for span in spans if span.number == len(messages) - 1), default=None)
            if answer is None:
                raise inexact(conversation, "the template rewrites the final answer")
        if answer is not None:
            roles[self._header_start(text, conversation, answer, generation) : answer] = int(Role.HEADER)
        return ChatText(text, roles, answer)

    @cached_property
    def _takes_system(self) -> bool:
        system, user = (Message(role, _PLACEHOLDER.format(role)) for role in ("system", "user"))
        try:
            return system.content in self._render(Conversation((system, user)), False)
        except InputError:
            return False

    def _render(self, conversation: Conversation, generation: bool) -> str:
        from jinja2 import TemplateError

        turns = [{"role": message.role, "content": message.content} for message in conversation.messages]
        try:
            text: str = self._tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=generation,
                added_bos=self._added_bos,
                chat_template=self._template,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            turns_given = ", ".join(message.role for message in conversation.messages)
            raise InputError(
                "conversations",
                expected="turns that the chat template accepts",
                received=f"{_name(conversation)} with the roles {turns_given} ({error})",
                remedy="change the turns, or load the model with another chat_template",
            ) from error
        return text

    def _spans_in_frame(self, text: str, messages: Sequence[Message], generation: bool) -> list[_Span] | None:
        """Where each content stands as a whole; `None` if one does not."""
        frame = self._frame(tuple(message.role for message in messages), generation)
        numbers = sorted(map(int, frame[1::2]))
        return (
            _fill(frame, [message.content for message in messages], text)
            if numbers == [*range(len(messages))]
            else None
        )

    def _frame(self, roles: tuple[str, ...], generation: bool) -> list[str]:
        """Template text and numbers of contents in turn."""
        if (roles, generation) not in self._frames:
            marked = [Message(role, _PLACEHOLDER.format(number)) for number, role in enumerate(roles)]
            self._frames[roles, generation] = _PLACEHOLDERS.split(
                self.render(Conversation(tuple(marked)), generation=generation)
            )
        return self._frames[roles, generation]

    def _spans_between_tags(self, text: str, conversation: Conversation, generation: bool) -> list[_Span]:
        """Where the stretches between tags stand, with the tags at their sides that the template left there."""
        stretches: list[_Stretch] = []
        marked, ends = [], set()
        for number, message in enumerate(conversation.messages):
            content, found = self._mark_between_tags(message.content, number, len(stretches))
            marked.append(Message(message.role, content))
            stretches += found
            ends |= {len(stretches) - 1} if found else set()
        frame = _PLACEHOLDERS.split(self.render(replace(conversation, messages=tuple(marked)), generation=generation))
        filled = _fill(frame, [stretch.text for stretch in stretches], text)
        kept = [int(index) for index in frame[1::2]]
        if filled is None or len(set(kept)) < len(kept) or not ends <= set(kept):
            raise inexact(conversation, "the template changes, repeats or leaves out a content")
        spans: list[_Span] = []
        for (start, end, index), before, after in zip(filled, frame[0::2], frame[2::2], strict=False):
            stretch = stretches[index]
            inside = bool(spans) and spans[-1].number == stretch.number
            start -= _tags_at_end(before, stretch.tags_before, inside)
            spans.append(_Span(start, end + _tags_at_start(after, stretch.tags_after), stretch.number))
        return spans

    def _mark_between_tags(self, content: str, number: int, first: int) -> tuple[str, list[_Stretch]]:
        """A content with a placeholder for each stretch between tags that the template knows, and the stretches."""
        known = [re.escape(tag) for tag in dict.fromkeys(_TAGS.findall(content)) if tag in self._template]
        parts = re.split("(" + "|".join(known) + ")", content) if known else [content]
        stretches: list[_Stretch] = []
        tags: list[str] = []
        for i, part in enumerate(parts):
            if i % 2:
                tags.append(part)
            elif part.strip():
                parts[i] = _PLACEHOLDER.format(first + len(stretches))
                stretches.append(_Stretch(number, part, tags, []))
                tags = []
        if stretches:
            stretches[-1].tags_after.extend(tags)
        return "".join(parts), stretches

    def _header_start(self, text: str, conversation: Conversation, answer: int, generation: bool) -> int:
        """Where the text that opens the final assistant turn starts."""
        before = conversation.messages if generation else conversation.messages[:-1]
        if before:
            start = self._length_before(replace(conversation, messages=before), text)
            if start is None or start > answer:
                raise inexact(conversation, "the template renders earlier turns differently once an answer follows")
            return start
        user, assistant = (Message(role, _PLACEHOLDER.format(role)) for role in ("user", "assistant"))
        answered = self.render(Conversation((user, assistant)))  # shows what opens an answer that comes first here
        start = self._length_before(Conversation((user,)), answered)
        opening = answered[start : answered.find(assistant.content)]
        if start is None or not text[:answer].endswith(opening):
            raise inexact(conversation, "the template opens an answer without a question in a way of its own")
        return answer - len(opening)

    def _length_before(self, earlier: Conversation, text: str) -> int | None:
        """Length of these turns at the start of a text that goes on; `None` if it starts otherwise."""
        start = self.render(earlier)
        if not text.startswith(start):  # Phi-3's ends with EOS, wherever the conversation ends
            start = start.removesuffix(self._tokenizer.eos_token or "")
        return len(start) if text.startswith(start) else None


def added_prefix(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before a plain text: BOS, or nothing."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return [token for token, special in takewhile(lambda pair: pair[1], pairs)]


def render(conversation: Conversation, tokenizer: Any, *, add_generation_prompt: bool = False) -> str:
    """The text that a chat template makes of a conversation.

    A template that knows no system role gets the system content at the head of the first user turn.

    Raises:
        InputError: if there is no template, or if it refuses the turns.
    """
    return ChatTemplate(tokenizer).render(conversation, generation=add_generation_prompt)


def inexact(conversation: Conversation, why: str) -> InputError:
    """The error for roles that cannot be found."""
    return InputError(
        "conversations",
        expected="a chat template from which token roles can be found exactly",
        received=f"{_name(conversation)}: {why}",
        remedy="change the conversation, or load the model with another chat_template",
    )


def _name(conversation: Conversation) -> str:
    return conversation.id or "a conversation"


def _fill(frame: Sequence[str], contents: Sequence[str], text: str) -> list[_Span] | None:
    """Where the contents stand if, filled into a frame, they give this text to the letter.

    Templates may keep or drop white space at the edges of a content.
    """
    if not text.startswith(frame[0]):
        return None
    spans, at = [], len(frame[0])
    for index, after in zip(map(int, frame[1::2]), frame[2::2], strict=True):
        kept = next((kept for kept in _trims(contents[index]) if text.startswith(kept + after, at)), None)
        if kept is None:
            return None
        spans.append(_Span(at, at + len(kept), index))
        at += len(kept) + len(after)
    return spans if at == len(text) else None


def _trims(content: str) -> Iterator[str]:
    """What templates leave of a content: all of it, or all but white space at its edges."""
    yield content
    if content != content.strip():
        for characters in (None, "\n"):
            yield from (content.strip(characters), content.lstrip(characters), content.rstrip(characters))


def _tags_at_end(text: str, tags: Sequence[str], inside: bool) -> int:
    """Length of these tags at the end of a text; `inside` a content, white space before them belongs to it too."""
    pattern = (r"\s*" if inside else "") + r"\s*".join(map(re.escape, tags)) + r"\s*\Z"
    found = re.search(pattern, text) if tags else None
    return len(found[0]) if found else 0


def _tags_at_start(text: str, tags: Sequence[str]) -> int:
    found = re.match(r"\s*" + r"\s*".join(map(re.escape, tags)), text) if tags else None
    return len(found[0]) if found else 0
