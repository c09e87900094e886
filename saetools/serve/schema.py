"""What the server understands of the OpenAI API, and what it answers; fields that it would not honour are errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from saetools.engine import Piece, Reason


class _Asked(BaseModel):
    """Fields that chats and plain completions share."""

    model_config = ConfigDict(extra="forbid")

    model: str
    edits: list[str] = []
    """saetools': edits as text, such as `clamp 6400=0 on response`; they run in this order."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=16)] = 1
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A turn."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

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

    def whole(self, answers: Sequence[Sequence[Piece]], n_prompt_tokens: int) -> dict[str, Any]:
        """The response with all choices."""
        choices = []
        for index, pieces in enumerate(answers):
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
            return {
                "tokens": [self._decode(token) for token, _, _ in tokens],
                "token_logprobs": [value for _, value, _ in tokens],
                "top_logprobs": [{self._decode(other): p for other, p in top} for _, _, top in tokens],
                "text_offset": [],
            }
        content = [
            self._token(token, value) | {"top_logprobs": [self._token(*other) for other in top]}
            for token, value, top in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, value: float) -> dict[str, Any]:
        text = self._decode(token)
        return {"token": text, "logprob": value, "bytes": list(text.encode())}


def _usage(n_prompt: int, n_new: int) -> dict[str, int]:
    return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}
