"""What the server understands of the OpenAI API, and what it answers; fields that it would not honour are errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from saetools.data.conversation import Conversation, Message
from saetools.engine import Piece, Reason


class _Strict(BaseModel):
    """Fields that are not known are errors; those that are null, or empty lists, are as if they were not there."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = cls.model_fields
        return {name: one for name, one in value.items() if one is not None and not (one == [] and name not in known)}


class _Asked(_Strict):
    """Fields that chats and plain completions share."""

    model: str
    edits: list[str] = []
    """saetools': edits as text, such as `clamp 6400=0 on response`; they run in this order."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=16)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    user: str | None = None

    @model_validator(mode="after")
    def _together(self) -> Any:
        if self.stream and self.n > 1:
            raise ValueError("n: 1, where the answer is streamed")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: none, where the answer is not streamed")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """What it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Asked):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _with_log_probs(self) -> Any:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: none, where logprobs are not asked for")
        return self

    def conversation(self) -> Conversation:
        """What is asked."""
        roles = {"developer": "system"}
        return Conversation(tuple(Message(roles.get(one.role, one.role), one.text) for one in self.messages))

    @property
    def n_top(self) -> int | None:
        """How many likely tokens to tell, `None` for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def length(self) -> int | None:
        """Longest answer, if one is asked for."""
        return self.max_completion_tokens or self.max_tokens


class TextRequest(_Asked):
    """`POST /v1/completions`."""

    prompt: str
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] = False

    @property
    def n_top(self) -> int | None:
        """How many likely tokens to tell, `None` for no log-probabilities."""
        return self.logprobs

    @property
    def length(self) -> int:
        """Longest answer."""
        return self.max_tokens or 16


def error_body(message: str, kind: str, *, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


class Writer:
    """Writes answers to one request.

    Args:
        kind: which API.
        model: as the client called it.
        decode: text of a token.
    """

    def __init__(self, kind: Literal["chat", "text"], model: str, decode: Callable[[int], str]) -> None:
        self._chat, self._model, self._decode = kind == "chat", model, decode
        self._id = ("chatcmpl-" if self._chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())
        self._length = 0  # of the text whose log-probabilities were told

    def whole(self, answers: Sequence[Sequence[Piece]], n_prompt_tokens: int) -> dict[str, Any]:
        """The response with all choices."""
        choices = []
        for index, pieces in enumerate(answers):
            self._length = 0
            text, reason = "".join(piece.text for piece in pieces), pieces[-1].reason
            content: dict[str, Any] = {"text": text}
            if self._chat:
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append({"index": index, **content, "finish_reason": reason, "logprobs": self._log_probs(pieces)})
        n_tokens = sum(len(piece.token_ids) for pieces in answers for piece in pieces)
        kind = "chat.completion" if self._chat else "text_completion"
        return self._body(kind, choices) | {"usage": _usage(n_prompt_tokens, n_tokens)}

    def first(self) -> dict[str, Any] | None:
        """What opens a stream."""
        return self._chunk({"role": "assistant", "content": ""}, None, None) if self._chat else None

    def piece(self, piece: Piece) -> dict[str, Any]:
        """New text."""
        return self._chunk({"content": piece.text}, None, self._log_probs([piece]))

    def last(self, reason: Reason | None) -> dict[str, Any]:
        """The end of a stream."""
        return self._chunk({}, reason, None)

    def usage(self, n_prompt_tokens: int, n_tokens: int) -> dict[str, Any]:
        """What follows the end, if it is asked for."""
        return self._body(self._stream_kind, []) | {"usage": _usage(n_prompt_tokens, n_tokens)}

    @property
    def _stream_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(self, delta: Mapping[str, Any], reason: Reason | None, log_probs: Any) -> dict[str, Any]:
        content = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        choice = {"index": 0, **content, "finish_reason": reason, "logprobs": log_probs}
        return self._body(self._stream_kind, [choice])

    def _body(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def _log_probs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        tokens = [
            (token, value, top)
            for piece in pieces
            for token, value, top in zip(piece.token_ids, piece.log_probs, piece.top, strict=False)
        ]
        if not tokens:
            return None
        if not self._chat:
            texts = [self._decode(token) for token, _, _ in tokens]
            top = [
                {self._decode(other): p for other, p in reversed(best)} for _, _, best in tokens
            ]  # likelier ones last
            offsets = [self._length + sum(map(len, texts[:place])) for place in range(len(texts))]
            self._length += sum(map(len, texts))
            values = [value for _, value, _ in tokens]
            return {"tokens": texts, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}
        content = [
            self._token(token, value) | {"top_logprobs": [self._token(*other) for other in top]}
            for token, value, top in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, value: float) -> dict[str, Any]:
        text = self._decode(token)
        return {"token": text, "logprob": value, "bytes": None if "\ufffd" in text else list(text.encode())}


def _usage(n_prompt: int, n_new: int) -> dict[str, int]:
    return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}
