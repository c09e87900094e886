"""Language models behind an OpenAI-compatible address: bounded, retried requests within a budget.

Use it for judges and explainers. A request ends in a reply or in a reason; nothing is made up for an answer that did
not come. Keys are neither written to files nor shown in errors.
"""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from saetools.data.conversation import Message
from saetools.errors import InputError, SaetoolsError

if TYPE_CHECKING:
    import openai

KEY_VARIABLE = "OPENAI_API_KEY"
_LONGEST_WAIT = 60.0  # seconds before a retry; a server that asks for more is not waited for
_BACKOFF = 0.5  # seconds, doubled by every retry
_MOST_BYTES = 10_000_000  # of an answer
_SHOWN = 200  # characters of what a server said, in a reason
_PASSING = (408, 409, 425, 429)  # statuses below 500 that another try may not meet
_MISCONFIGURED = (401, 403, 404)


class AnswerError(SaetoolsError):
    """A question that got no answer, with the reason."""


class BudgetSpentError(SaetoolsError):
    """The budget does not allow another request."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible address, and how patient to be with it.

    Args:
        base_url: address up to the version, such as `http://localhost:8000/v1`.
        model: as the server calls it.
        api_key: by default what the environment has as `OPENAI_API_KEY`; a server without keys needs neither.
        timeout: seconds until a request counts as lost.
        max_retries: further requests after one that was lost, refused for its rate, or met a server's error.
        max_concurrent: requests in flight at the same time.
        request: further fields of the request's body; `None` leaves out one that saetools sends.

    Raises:
        InputError: for an address that is none, or that holds a password, or for a bound that is none.

    Example:
        >>> Endpoint("http://localhost:8000/v1", "my-model", api_key="secret")
        Endpoint(base_url='http://localhost:8000/v1', model='my-model', timeout=60.0, max_retries=5, ...)
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    max_retries: int = 5
    max_concurrent: int = 4
    request: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise InputError(
                "base_url",
                expected="http(s)://host/path without user, password and query",
                received=f"{len(self.base_url)} characters of another form",  # they may hold a password
                remedy="pass keys as api_key",
            )
        for name, good, expected in (
            ("timeout", 0 < self.timeout < math.inf, "more than 0 seconds"),
            ("max_retries", self.max_retries >= 0, "0 or more"),
            ("max_concurrent", self.max_concurrent >= 1, "1 or more"),
        ):
            if not good:
                raise InputError(name, expected=expected, received=getattr(self, name), remedy="pick another")

    def describe(self) -> dict[str, Any]:
        """What a result says of its judge: everything but the key and the patience."""
        return {"base_url": self.base_url, "model": self.model, "request": dict(self.request)}

    def chat(self, messages: Sequence[Message], *, max_tokens: int, temperature: float = 0.0) -> Reply:
        """Ask once, over a connection of its own; `ChatSession` keeps one open.

        Raises:
            AnswerError: if no reply came.
            InputError: if the server does not know the key or the model.
        """
        with ChatSession(self) as session:
            return session.ask(messages, max_tokens=max_tokens, temperature=temperature)


@dataclass(frozen=True)
class Reply:
    """What a model answered.

    Args:
        text: the answer; empty if the model said nothing.
        cut_off: whether it ended at `max_tokens`.
        n_tokens: of prompt and answer together; `None` if the server did not say.
    """

    text: str
    cut_off: bool
    n_tokens: int | None


@dataclass(frozen=True)
class Budget:
    """What a run may spend.

    Args:
        max_requests: of all requests, retries included.
        max_tokens: of prompts and answers. No request starts beyond it; those in flight then still end.
    """

    max_requests: int | None = None
    max_tokens: int | None = None


class Spending:
    """Counts requests and tokens against a budget, from any thread.

    Args:
        budget: what may be spent.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.n_requests = 0
        self.n_tokens = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Count a request that is about to be sent.

        Raises:
            BudgetSpentError: instead of counting one too many.
        """
        most, most_tokens = self.budget.max_requests, self.budget.max_tokens
        with self._lock:
            if most is not None and self.n_requests >= most:
                raise BudgetSpentError(f"{self.n_requests} of {most} requests are spent; raise max_requests")
            if most_tokens is not None and self.n_tokens >= most_tokens:
                raise BudgetSpentError(f"{self.n_tokens} of {most_tokens} tokens are spent; raise max_tokens")
            self.n_requests += 1

    def end(self, reply: Reply) -> None:
        """Count the tokens of a reply.

        Raises:
            InputError: if tokens are to be bounded, and the reply does not say how many it took.
        """
        if reply.n_tokens is None and self.budget.max_tokens is not None:
            raise InputError(
                "budget.max_tokens",
                expected="a server that reports the tokens of its answers",
                received="one that does not",
                remedy="bound requests instead",
            )
        with self._lock:
            self.n_tokens += reply.n_tokens or 0


class ChatSession:
    """An open connection to an endpoint, which may be asked from several threads.

    Args:
        endpoint: whom to ask.
        spending: what requests are counted by; without a budget by default.

    Example:
        >>> with ChatSession(Endpoint("http://localhost:9/v1", "m", max_retries=0)) as session:
        ...     session.ask([Message("user", "Hello?")], max_tokens=8)
        Traceback (most recent call last):
        saetools.endpoint.AnswerError: no connection (after 1 request)
    """

    def __init__(self, endpoint: Endpoint, *, spending: Spending | None = None) -> None:
        try:
            import openai
        except ImportError as error:
            raise InputError(
                "endpoint", expected="the package openai", received="none", remedy="pip install saetools[judge]"
            ) from error
        self.endpoint = endpoint
        self.spending = spending or Spending(Budget())
        self._key = endpoint.api_key or os.environ.get(KEY_VARIABLE) or ""
        self._free = threading.Semaphore(endpoint.max_concurrent)
        self._closed = threading.Event()
        self._client = openai.OpenAI(
            base_url=endpoint.base_url,
            api_key=self._key or "none",  # the client insists on one
            timeout=endpoint.timeout,
            max_retries=0,  # ours are counted, and end
        )

    def __enter__(self) -> ChatSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; threads that wait for a retry give up."""
        self._closed.set()
        self._client.close()

    def ask(self, messages: Sequence[Message], *, max_tokens: int, temperature: float = 0.0) -> Reply:
        """Ask, and ask again after what may pass: a time-out, a lost connection, a rate limit, a server's error.

        Between requests it waits as long as the server's `Retry-After` says, or a random part of a time that doubles.

        Args:
            messages: the conversation, which ends with the user's turn.
            max_tokens: longest answer.
            temperature: 0 takes the most likely token.

        Raises:
            AnswerError: if no reply came, with the last reason.
            BudgetSpentError: if the budget does not allow the request.
            InputError: if the server does not know the key or the model.
        """
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        body = {name: value for name, value in {**body, **self.endpoint.request}.items() if value is not None}
        reason = ""
        for n_sent in range(1, self.endpoint.max_retries + 2):
            try:
                with self._free:
                    self.spending.begin()
                    reply = self._request(body)
            except _PassingError as error:
                reason = f"{error} (after {n_sent} request{'s' if n_sent > 1 else ''})"
                if n_sent > self.endpoint.max_retries or (error.retry_after or 0) > _LONGEST_WAIT:
                    break
                if self._closed.wait(_seconds_until_retry(n_sent, error.retry_after)):
                    break
            else:
                self.spending.end(reply)
                return reply
        raise AnswerError(reason)

    def _request(self, body: dict[str, Any]) -> Reply:
        import openai

        deadline = time.monotonic() + self.endpoint.timeout
        # Not chained: the client's errors quote what the server said, which may be the key.
        try:
            # All of it as an extra body: which fields a server knows is not for the client to say.
            with self._client.chat.completions.with_streaming_response.create(
                model=self.endpoint.model, messages=[], extra_body=body
            ) as response:
                raw = _read_body(response, deadline)
        except openai.APITimeoutError:
            raise _PassingError(f"no answer within {self.endpoint.timeout:g} s") from None
        except openai.APIConnectionError:
            raise _PassingError("no connection") from None
        except openai.APIStatusError as error:
            raise self._status_error(error) from None
        return _parse_reply(raw, self._shown)

    def _status_error(self, error: openai.APIStatusError) -> Exception:
        status = error.status_code
        if status in _MISCONFIGURED or error.code == "insufficient_quota":
            return InputError(
                "endpoint",
                expected=f"a server that gives answers of {self.endpoint.model!r}",
                received=f"status {status} from {self.endpoint.base_url}",
                remedy=f"check base_url, model, and api_key or {KEY_VARIABLE}",
            )
        reason = f"status {status}: {self._shown(error.response.text)}"
        if status in _PASSING or status >= 500:
            return _PassingError(reason, retry_after=_retry_after(error.response.headers))
        return AnswerError(reason)

    def _shown(self, text: str) -> str:
        """The start of what a server said, without the key."""
        hidden = text.replace(self._key, "[key]") if self._key else text
        return " ".join(hidden.split())[:_SHOWN]


class _PassingError(Exception):
    """What another request may not meet, and how many seconds the server asks to wait."""

    def __init__(self, reason: str, *, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


def _read_body(response: Any, deadline: float) -> bytes:
    """The body, however slowly it comes: the client's time-out starts anew with every byte."""
    body = bytearray()
    try:
        for piece in response.iter_bytes():
            body += piece
            if time.monotonic() > deadline:
                raise _PassingError("the answer took longer than the time-out")
            if len(body) > _MOST_BYTES:
                raise _PassingError(f"an answer of more than {_MOST_BYTES} bytes")
    except _PassingError:
        raise
    except Exception:  # of the transport, which is another one in older versions of the client
        raise _PassingError("the answer broke off") from None
    return bytes(body)


def _parse_reply(raw: bytes, shown: Callable[[str], str]) -> Reply:
    try:
        answer = json.loads(raw)
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        usage = answer.get("usage") or {}
        n_tokens = usage.get("total_tokens")
        cut_off = choice.get("finish_reason") == "length"
        if not isinstance(text, str | None) or not isinstance(n_tokens, int | None):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        received = shown(raw.decode(errors="replace"))
        raise _PassingError(f"no chat completion: {received or 'nothing'}") from None
    # JSON can escape half a character, which nothing could be done with.
    return Reply((text or "").encode(errors="replace").decode(), cut_off, n_tokens)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: a number, or a date."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _seconds_until_retry(n_sent: int, retry_after: float | None) -> float:
    """Never less than asked for; a random part on top, so that threads do not come back together."""
    jitter = random.random()
    if retry_after is not None:
        return retry_after + jitter * _BACKOFF
    return min(_LONGEST_WAIT, _BACKOFF * 2.0 ** (n_sent - 1)) * (1 + jitter) / 2
