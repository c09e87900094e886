"""One thread that answers many requests at a time, each by its model and under its own edits, and streams what it says.

Requests may come from any thread. Only the engine's own runs the models, so no request sees the edits or the adapter of
another; requests of one model share a lane, and whoever comes later joins at the next token. While an engine is open,
nothing else may run its models. An edit that is somebody's own function and fails in the middle of an answer takes the
other answers of its lane with it; those of `saetools.steer` do not fail there.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch

from saetools.data.conversation import Conversation
from saetools.data.tokenizing import TokenizedConversation, tokenize
from saetools.decoding import Lane, Row
from saetools.errors import InputError, NonFiniteError, SaetoolsError
from saetools.generation import check_sampling, tokenize_prompts
from saetools.models.editing import Edits
from saetools.models.language_model import LanguageModel
from saetools.models.layout import is_hooked_transformer, locate

T = TypeVar("T")
Reason = Literal["stop", "length"]
_UNKNOWN = "\ufffd"  # of bytes that are no whole character yet
_STEPS = 8  # tokens that one model makes before the next has its turn


class BusyError(SaetoolsError):
    """Too many requests wait."""


@dataclass(frozen=True)
class Request:
    """What is asked, and how it is answered.

    Args:
        prompt: a conversation that ends with the user's turn, or a plain text that is continued.
        model: name of the model that answers.
        edits: edits per site.
        max_new_tokens: longest answer.
        temperature: 0 takes the most likely token.
        top_p: draw from the smallest set of tokens with so much probability.
        seed: of the answer's random numbers.
        stop: texts that end an answer; they are not part of it.
        n_top: how many of the likeliest tokens to tell at every place, besides the chosen one's log-probability.
    """

    prompt: Conversation
    model: str
    edits: Edits | None = None
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    n_top: int | None = None

    def __post_init__(self) -> None:
        check_sampling(self.max_new_tokens, self.temperature, self.top_p)
        for name, good, expected in (
            ("seed", -(2**63) <= self.seed < 2**63, "a number of 64 bits"),
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


Sink = Callable[[Piece | BaseException | None], None]
"""Takes the pieces of an answer as they come, on the engine's thread; an error, or `None`, comes last of all."""


class Stream:
    """An answer as it comes: iterate over its pieces, once.

    Args:
        n_prompt_tokens: length of what is answered.
        sink: takes pieces instead, and nothing is to be iterated over.
    """

    def __init__(self, n_prompt_tokens: int, sink: Sink | None = None) -> None:
        self.n_prompt_tokens = n_prompt_tokens
        self._pieces: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()
        self.tell: Sink = self._pieces.put if sink is None else sink
        self._cancelled = threading.Event()

    def __iter__(self) -> Iterator[Piece]:
        while (piece := self._pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def text(self) -> str:
        """The whole answer, when it is there."""
        return "".join(piece.text for piece in self)

    def cancel(self) -> None:
        """Have no more of it; who iterates comes to an end."""
        self._cancelled.set()
        self._pieces.put(None)

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants it any more."""
        return self._cancelled.is_set()


@dataclass(eq=False)
class _Answer:
    """A request that is being answered."""

    request: Request
    row: Row
    stream: Stream
    text: Growing
    n_told: int = 0


class Engine:
    """Answers requests until it is closed.

    Args:
        models: Hugging Face models by name: views of one model, or several.
        max_rows: requests that are answered at a time.
        max_waiting: requests that may wait for others to be done.

    Raises:
        InputError: for no model, a TransformerLens model, or bounds below 1.

    Example:
        >>> with Engine({"base": lm.base}) as engine:
        ...     streams = [
        ...         engine.submit(Request(Conversation.chat(text), "base", max_new_tokens=8, temperature=0.0))
        ...         for text in ("Say hi.", "Name a colour.")
        ...     ]
        ...     [stream.text() for stream in streams]
        ["Hello there! I'm here to help", 'The colour is a rare and precious one']
    """

    def __init__(self, models: Mapping[str, LanguageModel], *, max_rows: int = 32, max_waiting: int = 256) -> None:
        for name, good, expected, received in (
            ("models", bool(models), "one or more", 0),
            ("max_rows", max_rows >= 1, "1 or more", max_rows),
            ("max_waiting", max_waiting >= 1, "1 or more", max_waiting),
        ):
            if not good:
                raise InputError(name, expected=expected, received=received, remedy="raise it")
        if hooked := [name for name, lm in models.items() if is_hooked_transformer(lm.model)]:
            raise InputError(
                "models",
                expected="Hugging Face models",
                received=f"{hooked[0]}, a HookedTransformer",
                remedy="load the original",
            )
        self.models = dict(models)
        self._max_rows, self._max_waiting = max_rows, max_waiting
        self._inbox: queue.SimpleQueue[_Answer | Callable[[], None] | None] = queue.SimpleQueue()
        self._open = threading.Lock()
        self._closed = False
        self._waiting: list[_Answer] = []
        self._running: dict[str, list[_Answer]] = {name: [] for name in models}
        self._lanes = {name: Lane(lm) for name, lm in models.items()}
        self._thread = threading.Thread(target=self._run, name="saetools-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, *, sink: Sink | None = None) -> Stream:
        """Have a request answered; returns at once.

        Args:
            request: what is asked.
            sink: takes the pieces, on the engine's thread, instead of the stream.

        Raises:
            InputError: for an unknown model or site, a prompt that ends with an answer, or one that does not fit the
                context together with its answer.
            BusyError: if too many wait.
            RuntimeError: if the engine is closed.
        """
        lm = self.model(request.model)
        for site in request.edits or {}:
            locate(lm.model, lm.layout, site)
        prompt = self._tokenized(lm, request.prompt)
        lm.check_length(len(prompt) + request.max_new_tokens, argument="max_new_tokens, with the prompt")
        random = torch.Generator().manual_seed(request.seed)
        settings = (request.max_new_tokens, request.temperature, request.top_p, request.n_top)
        stream = Stream(len(prompt), sink)
        row = Row(prompt, request.edits, random, *settings)
        with self._open:
            if self._closed:
                raise RuntimeError("the engine is closed")
            if self._inbox.qsize() + len(self._waiting) >= self._max_waiting:
                raise BusyError(f"{self._max_waiting} requests wait already; try again later")
            self._inbox.put(_Answer(request, row, stream, Growing(lm.tokenizer, request.stop)))
        return stream

    def between(self, work: Callable[[], T]) -> T:
        """Do something else with the models, on the engine's thread, between two tokens of the answers.

        Args:
            work: what to do; what it raises is raised here.

        Returns:
            What it gives.

        Raises:
            RuntimeError: if the engine is closed.
        """
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # whoever waits has to be told
                done.set_exception(error)

        with self._open:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._inbox.put(run)
        return done.result()

    def model(self, name: str) -> LanguageModel:
        """One of the models.

        Raises:
            InputError: for an unknown name.
        """
        if name not in self.models:
            known = ", ".join(self.models)
            raise InputError("model", expected=f"one of {known}", received=repr(name), remedy="pick one of these")
        return self.models[name]

    def room(self, model: str, prompt: Conversation) -> int | None:
        """How long an answer to a prompt may be within the context; `None` if the model has no bound.

        Raises:
            InputError: for an unknown model, or a prompt that ends with an answer.
        """
        lm = self.model(model)
        return None if lm.n_context is None else lm.n_context - len(self._tokenized(lm, prompt))

    def close(self) -> None:
        """Stop; answers that are not complete end with an error."""
        with self._open:
            already, self._closed = self._closed, True
        if not already:
            self._inbox.put(None)
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tokenized(self, lm: LanguageModel, prompt: Conversation) -> TokenizedConversation:
        return tokenize_prompts(lm, [prompt])[0] if prompt.messages else next(tokenize([prompt], lm.tokenizer))

    def _run(self) -> None:
        reason: BaseException = RuntimeError("the engine was closed")
        try:
            while self._receive():
                self._admit()
                busy = [name for name, answers in self._running.items() if answers]
                for name in busy:
                    self._advance(name, n_steps=1 if len(busy) == 1 else _STEPS)
        except BaseException as error:  # whoever waits has to be told
            reason = error
        with self._open:
            self._closed = True
        while not self._inbox.empty():
            received = self._inbox.get()
            if isinstance(received, _Answer):
                self._waiting.append(received)
            elif received is not None:
                received()
        for answer in (*self._waiting, *(one for some in self._running.values() for one in some)):
            answer.stream.tell(reason)

    def _receive(self) -> bool:
        """Take what has come, and wait for something if there is nothing to do; whether to go on."""
        idle = not self._waiting and not any(self._running.values())
        with suppress(queue.Empty):
            while True:
                received = self._inbox.get(block=idle)
                if received is None:
                    return False
                if isinstance(received, _Answer):
                    self._waiting.append(received)
                    idle = False
                else:
                    received()
        return True

    def _admit(self) -> None:
        """Begin with as many waiting requests as there is room for."""
        self._waiting = [answer for answer in self._waiting if not answer.stream.is_cancelled]
        free = self._max_rows - sum(map(len, self._running.values()))
        new, self._waiting = self._waiting[:free], self._waiting[free:]
        for name, running in self._running.items():
            if own := [answer for answer in new if answer.request.model == name]:
                running += _admitted(self._lanes[name], own)

    def _advance(self, name: str, *, n_steps: int) -> None:
        """Tell what is new of a lane's answers, let go of what is done, and make the next tokens."""
        lane = self._lanes[name]
        with self.models[name].active():  # switching adapters costs more than a token
            for _ in range(n_steps):
                answers = self._running[name]
                going = [answer for answer in answers if _told(answer)]
                lane.drop([answer.row for answer in answers if answer not in going])
                self._running[name] = going
                if not going:
                    return
                try:
                    lane.step()
                except Exception as error:  # nobody knows whose fault it is
                    for answer in going:
                        answer.stream.tell(error)
                    lane.drop([answer.row for answer in going])
                    self._running[name] = []
                    return


class Growing:
    """The text of an answer as tokens are added, without what may still change.

    Args:
        tokenizer: of the model.
        stops: texts that end it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._whole, self._shown = "", 0
        self._start, self._end = 0, 0  # of tokens whose text is known, the last few of which give the next their spaces

    def grow(self, token_ids: Sequence[int], *, is_done: bool) -> tuple[str, bool]:
        """The text that is new, and whether a stop text ended it.

        Args:
            token_ids: the whole answer.
            is_done: whether no more will come.
        """
        before, now = (self._decoded(token_ids[self._start : end]) for end in (self._end, len(token_ids)))
        if is_done or not now.endswith(_UNKNOWN):
            self._whole += now[len(before) :]
            self._start, self._end = self._end, len(token_ids)
        ends = [place for stop in self._stops if (place := self._whole.find(stop)) >= 0]
        shown = self._whole[: min(ends)] if ends else self._whole
        if not ends and not is_done:
            shown = settled(shown, self._stops)
        new, self._shown = shown[self._shown :], max(self._shown, len(shown))
        return new, bool(ends)

    def _decoded(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


def settled(text: str, stops: Sequence[str]) -> str:
    """The part of a text that is no beginning of a stop text."""
    for length in range(max(map(len, stops), default=0) - 1, 0, -1):
        if any(len(stop) > length and text.endswith(stop[:length]) for stop in stops):
            return text[:-length]
    return text


def _told(answer: _Answer) -> bool:
    """Hand out what is new of an answer; whether it goes on."""
    row, stream = answer.row, answer.stream
    if stream.is_cancelled:
        return False
    if row.broken:
        stream.tell(NonFiniteError("the output of the model is not finite: lower the strength of the edits"))
        return False
    text, stopped = answer.text.grow(row.answer_ids, is_done=row.is_done)
    reason: Reason | None = "stop" if stopped or row.finished else "length" if row.is_done else None
    new = slice(answer.n_told, len(row.token_ids))
    answer.n_told = len(row.token_ids)
    stream.tell(
        Piece(text, tuple(row.token_ids[new]), tuple(row.log_probs[new]), tuple(map(tuple, row.top[new])), reason)
    )
    if reason is not None:
        stream.tell(None)
    return reason is None


def _admitted(lane: Lane, answers: Sequence[_Answer]) -> list[_Answer]:
    """Read prompts together; one by one if that fails, so that only those at fault are told."""
    try:
        lane.admit([answer.row for answer in answers])
    except Exception as error:
        if len(answers) > 1:
            return [answer for one in answers for answer in _admitted(lane, [one])]
        answers[0].stream.tell(error)
        return []
    return list(answers)
