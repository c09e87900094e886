"""One thread that answers many requests at a time, each under its own edits and adapter, and streams what it says.

Requests may come from any thread. Only the engine's own runs the model, so no request sees the edits or the adapter of
another; requests of one adapter share a lane, whoever comes later joins at the next token. While an engine is open,
nothing else may run the model.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

import torch

from saetools.data.conversation import Conversation
from saetools.data.tokenizing import TokenizedConversation, tokenize
from saetools.decoding import Lane, Row
from saetools.errors import InputError, NonFiniteError
from saetools.generation import tokenize_prompts
from saetools.models.editing import Edits
from saetools.models.language_model import LanguageModel
from saetools.models.layout import is_hooked_transformer, locate

Reason = Literal["stop", "length"]
_UNKNOWN = "\ufffd"  # of bytes that are no whole character yet


@dataclass(frozen=True)
class Request:
    """What is asked, and how it is answered.

    Args:
        prompt: a conversation that ends with the user's turn, or a plain text that is continued.
        adapter: the view that answers; `None` for the base.
        edits: edits per site.
        max_new_tokens: longest answer.
        temperature: 0 takes the most likely token.
        top_p: draw from the smallest set of tokens with so much probability.
        seed: of the answer's random numbers.
        stop: texts that end an answer; they are not part of it.
        n_top: how many of the likeliest tokens to tell at every place, besides the chosen one's log-probability.
    """

    prompt: Conversation
    adapter: str | None = None
    edits: Edits | None = None
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    n_top: int | None = None

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("stop", all(self.stop), "texts that are not empty"),
            ("n_top", self.n_top is None or self.n_top >= 0, "0 or more, or none"),
        ):
            if not good:
                raise InputError(name, expected=expected, received=getattr(self, name), remedy="pick another")


@dataclass(frozen=True)
class Piece:
    """What an answer grew by.

    Args:
        text: new text; may be empty while a character, or what may become a stop text, is not complete.
        token_ids: new tokens.
        log_probs: their log-probabilities, if they were asked for.
        top: the likeliest tokens at each place, if they were asked for.
        reason: with the last piece, why it is the last.
    """

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] = ()
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    reason: Reason | None = None


class Stream:
    """An answer as it comes: iterate over its pieces, once."""

    def __init__(self, n_prompt_tokens: int) -> None:
        self.n_prompt_tokens = n_prompt_tokens
        self._queue: queue.SimpleQueue[Piece | BaseException] = queue.SimpleQueue()
        self._cancelled = threading.Event()

    def __iter__(self) -> Iterator[Piece]:
        while True:
            piece = self._queue.get()
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            if piece.reason is not None:
                return

    def text(self) -> str:
        """The whole answer, when it is there."""
        return "".join(piece.text for piece in self)

    def cancel(self) -> None:
        """Have no more of it."""
        self._cancelled.set()


@dataclass(eq=False)
class _Answer:
    """A request that is being answered."""

    request: Request
    row: Row
    stream: Stream
    sent: str = ""
    n_told: int = field(default=0)


class Engine:
    """Answers requests until it is closed.

    Args:
        lm: any view of the model, a Hugging Face one.
        max_rows: requests that are answered at a time; others wait.

    Raises:
        InputError: for a TransformerLens model.

    Example:
        >>> with Engine(lm) as engine:
        ...     streams = [
        ...         engine.submit(Request(Conversation.chat(text), max_new_tokens=8, temperature=0.0))
        ...         for text in ("Say hi.", "Name a colour.")
        ...     ]
        ...     [stream.text() for stream in streams]
        ["Hello there! I'm here to help", 'I am known for my vibrant and vibrant']
    """

    def __init__(self, lm: LanguageModel, *, max_rows: int = 32) -> None:
        if is_hooked_transformer(lm.model):
            raise InputError(
                "lm", expected="a Hugging Face model", received="a HookedTransformer", remedy="load the original"
            )
        self._lm, self._max_rows = lm.base, max_rows
        self._inbox: queue.SimpleQueue[_Answer | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="saetools-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Stream:
        """Have a request answered; returns at once.

        Raises:
            InputError: for an unknown adapter or site, a prompt that ends with an answer, or one that does not fit the
                context together with its answer.
            RuntimeError: if the engine is closed.
        """
        if self._closed:
            raise RuntimeError("the engine is closed")
        if request.adapter is not None:
            self._lm.with_adapter(request.adapter)
        for site in request.edits or {}:
            locate(self._lm.model, self._lm.layout, site)
        prompt = self._tokenized(request.prompt)
        self._lm.check_length(len(prompt) + request.max_new_tokens, argument="max_new_tokens, with the prompt")
        random = torch.Generator().manual_seed(request.seed)
        settings = (request.max_new_tokens, request.temperature, request.top_p, request.n_top)
        stream = Stream(len(prompt))
        self._inbox.put(_Answer(request, Row(prompt, request.edits, random, *settings), stream))
        return stream

    def close(self) -> None:
        """Stop; answers that are not complete end with an error."""
        if not self._closed:
            self._closed = True
            self._inbox.put(None)
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tokenized(self, prompt: Conversation) -> TokenizedConversation:
        if prompt.messages:
            return tokenize_prompts(self._lm, [prompt])[0]
        return next(tokenize([prompt], self._lm.tokenizer))

    def _run(self) -> None:
        waiting: list[_Answer] = []
        running: dict[str | None, list[_Answer]] = {}
        lanes: dict[str | None, Lane] = {}
        while True:
            if not self._receive(waiting, wait=not any(running.values())):
                for answer in (*waiting, *(one for some in running.values() for one in some)):
                    answer.stream._queue.put(RuntimeError("the engine was closed"))
                return
            free = self._max_rows - sum(map(len, running.values()))
            new, waiting = waiting[:free], waiting[free:]
            for adapter in {answer.request.adapter for answer in new}:
                if adapter not in lanes:
                    lanes[adapter] = Lane(self._lm if adapter is None else self._lm.with_adapter(adapter))
                own = [answer for answer in new if answer.request.adapter == adapter]
                running.setdefault(adapter, []).extend(_admitted(lanes[adapter], own))
            for adapter, answers in running.items():
                running[adapter] = self._advanced(lanes[adapter], answers)

    def _receive(self, waiting: list[_Answer], *, wait: bool) -> bool:
        """Take what has come; whether to go on."""
        try:
            while True:
                answer = self._inbox.get(block=wait and not waiting)
                if answer is None:
                    return False
                waiting.append(answer)
        except queue.Empty:
            return True

    def _advanced(self, lane: Lane, answers: list[_Answer]) -> list[_Answer]:
        """Tell what is new, let go of what is done, and make the next token; the answers that go on."""
        going = [answer for answer in answers if self._told(answer)]
        lane.drop([answer.row for answer in answers if answer not in going])
        if going:
            try:
                lane.step()
            except Exception as error:  # nobody else can be told
                for answer in going:
                    answer.stream._queue.put(error)
                lane.drop([answer.row for answer in going])
                return []
        return going

    def _told(self, answer: _Answer) -> bool:
        """Hand out what is new of an answer; whether it goes on."""
        row, stream = answer.row, answer.stream
        if row.broken:
            stream._queue.put(NonFiniteError("the output of the model is not finite: lower the strength of the edits"))
            return False
        if stream._cancelled.is_set():
            return False
        text = self._lm.tokenizer.decode(row.answer_ids, skip_special_tokens=True)
        ends = [place for stop in answer.request.stop if (place := text.find(stop)) >= 0]
        reason: Reason | None = "stop" if ends or row.finished else "length" if row.is_done else None
        text = text[: min(ends)] if ends else text
        shown = text if reason is not None else _settled(text, answer.request.stop)
        new = slice(answer.n_told, len(row.token_ids))
        piece = Piece(
            shown[len(answer.sent) :],
            tuple(row.token_ids[new]),
            tuple(row.log_probs[new]),
            tuple(map(tuple, row.top[new])),
            reason,
        )
        answer.sent, answer.n_told = shown, len(row.token_ids)
        stream._queue.put(piece)
        return reason is None


def _admitted(lane: Lane, answers: Sequence[_Answer]) -> list[_Answer]:
    """Read prompts together; one by one if that fails, so that only those at fault are told."""
    try:
        lane.admit([answer.row for answer in answers])
        return list(answers)
    except Exception as error:
        if len(answers) == 1:
            answers[0].stream._queue.put(error)
            return []
        return [answer for one in answers for answer in _admitted(lane, [one])]


def _settled(text: str, stops: Sequence[str]) -> str:
    """The part of a text that cannot change any more: whole characters, and no beginning of a stop text."""
    text = text.rstrip(_UNKNOWN)
    for length in range(max(map(len, stops), default=0) - 1, 0, -1):
        if any(len(stop) > length and text.endswith(stop[:length]) for stop in stops):
            return text[:-length]
    return text
