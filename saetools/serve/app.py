"""The server: OpenAI's chat and text completions, with edits and adapter by request.

    client.chat.completions.create(model="organism", messages=[...], extra_body={"edits": ["clamp 6400=0 on response"]})

`model` is one of the models that are served; edits are those of `saetools.steer.text`. By default it answers only this
machine, only requests that call it by a name of this machine, and no page of another origin, so that nothing reaches it
through a browser.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from starlette.requests import Request as HTTPRequest
from torch import Tensor

from saetools.data.conversation import Conversation
from saetools.engine import BusyError, Engine, Piece, Request, Stream
from saetools.errors import InputError, SaetoolsError
from saetools.loopback import LOOPBACK
from saetools.models.language_model import LanguageModel
from saetools.models.layout import is_hooked_transformer
from saetools.models.site import Site
from saetools.sae.model import SAE
from saetools.serve.guard import Guard
from saetools.serve.schema import ChatRequest, TextRequest, Writer, error_body
from saetools.steer.text import parse_edits

if TYPE_CHECKING:
    from fastapi import FastAPI

_MOST_BYTES = 4_000_000  # of a request
_PATIENCE = 0.5  # seconds between looks whether a client is still there


@dataclass(frozen=True)
class ServerConfig:
    """Who may ask, and how much."""

    hosts: tuple[str, ...] = LOOPBACK
    """Names by which requests may call the server; `*` for any, where a key is asked for."""
    token: str | None = field(default=None, repr=False)
    """What clients have to send as their API key; `None` asks for none."""
    max_rows: int = 32
    """Requests answered at a time."""
    max_waiting: int = 256
    """Requests that may wait; more are told to try again."""
    max_new_tokens: int = 512
    """Length of answers whose request names none, or what is left of the context."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_waiting", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(name, expected="1 or more", received=getattr(self, name), remedy="raise it")
        if "*" in self.hosts and not self.token:
            raise InputError("hosts", expected="names, where no key is asked for", received="*", remedy="set a token")


def make_app(
    models: Mapping[str, LanguageModel],
    *,
    sae: SAE | None = None,
    site: Site | None = None,
    directions: Mapping[str, Mapping[Site, Float[Tensor, " d_model"]]] | None = None,
    config: ServerConfig = ServerConfig(),
) -> FastAPI:
    """An ASGI application, to be run by uvicorn or any other server; the models are its own while it runs.

    Args:
        models: Hugging Face models by name: views of one model, or several.
        sae: whose latents edits mean.
        site: where it reads, and where edits act that name no site; by default what the SAE's metadata says.
        directions: directions that edits may name, each at some sites.
        config: who may ask, and how much.

    Raises:
        InputError: for no model, or one of TransformerLens.

    Example:
        >>> app = make_app({"base": lm.base})
        >>> app.title
        'saetools'
    """
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    if not models or any(is_hooked_transformer(lm.model) for lm in models.values()):
        received = "a HookedTransformer" if models else "none"
        raise InputError("models", expected="Hugging Face models", received=received, remedy="load some")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with Engine(models, max_rows=config.max_rows, max_waiting=config.max_waiting) as engine:
            app.state.answering = _Answering(engine, sae, site, directions, config)
            yield

    app = FastAPI(title="saetools", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, token=config.token, hosts=config.hosts, most_bytes=_MOST_BYTES)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*config.hosts], www_redirect=False)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HTTPRequest, error: RequestValidationError) -> Any:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse(error_body(f"{param}: {first['msg']}", "invalid_request_error", param=param), 400)

    @app.exception_handler(BusyError)
    async def busy(_: HTTPRequest, error: BusyError) -> Any:
        return JSONResponse(error_body(str(error), "rate_limit_error"), 429)

    @app.exception_handler(SaetoolsError)
    async def refused(_: HTTPRequest, error: SaetoolsError) -> Any:
        param = getattr(error, "argument", None)
        return JSONResponse(error_body(str(error), "invalid_request_error", param=param), 400)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [_described(name) for name in models]}

    @app.get("/v1/models/{name:path}")
    async def one(name: str) -> Any:
        return _described(name) if name in models else _unknown(name, models)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: HTTPRequest) -> Any:
        return await app.state.answering.answer(asked, asked.conversation(), "chat", request)

    @app.post("/v1/completions")
    async def complete(asked: TextRequest, request: HTTPRequest) -> Any:
        return await app.state.answering.answer(asked, Conversation(text=asked.prompt), "text", request)

    return app


@dataclass(frozen=True)
class _Answering:
    """What requests are answered with."""

    engine: Engine
    sae: SAE | None
    site: Site | None
    directions: Mapping[str, Mapping[Site, Tensor]] | None
    config: ServerConfig

    async def answer(
        self, asked: ChatRequest | TextRequest, prompt: Conversation, kind: Literal["chat", "text"], request: Any
    ) -> Any:
        """The response."""
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import Response, StreamingResponse

        if asked.model not in self.engine.models:
            return _unknown(asked.model, self.engine.models)
        loop = asyncio.get_running_loop()
        answers = await run_in_threadpool(self._asked, asked, prompt, loop)
        tokenizer = self.engine.models[asked.model].tokenizer
        writer = Writer(kind, asked.model, lambda token: str(tokenizer.decode([token])))
        if asked.stream:
            usage = bool((asked.stream_options or {}).get("include_usage"))
            return StreamingResponse(_events(answers[0], writer, usage=usage), media_type="text/event-stream")
        whole = asyncio.ensure_future(asyncio.gather(*(answer.whole() for answer in answers)))
        try:
            while not (await asyncio.wait([whole], timeout=_PATIENCE))[0]:
                if await request.is_disconnected():
                    return Response(status_code=499)
            return writer.whole(whole.result(), answers[0].stream.n_prompt_tokens)
        finally:
            for answer in answers:
                answer.stream.cancel()
            whole.cancel()

    def _asked(
        self, asked: ChatRequest | TextRequest, prompt: Conversation, loop: asyncio.AbstractEventLoop
    ) -> list[_Told]:
        """Have every choice answered."""
        edits = parse_edits(asked.edits, sae=self.sae, site=self.site, directions=self.directions)
        room = self.engine.room(asked.model, prompt)
        length = asked.length or min(self.config.max_new_tokens, self.config.max_new_tokens if room is None else room)
        if room is not None and not 1 <= length <= room:
            raise InputError(
                "max_tokens",
                expected=f"at most {max(0, room)}, what the prompt leaves",
                received=length,
                remedy="ask for less",
            )
        seed = secrets.randbits(48) if asked.seed is None else asked.seed
        told = []
        for number in range(asked.n):
            one = _Told(loop)
            own = seed if not number else hash((seed, number)) & (2**63 - 1)
            settings = (asked.temperature, asked.top_p, own, asked.stops, asked.n_top)
            one.stream = self.engine.submit(Request(prompt, asked.model, edits, length, *settings), sink=one.take)
            told.append(one)
        return told


class _Told:
    """The pieces of an answer, brought from the engine's thread to the event loop."""

    stream: Stream

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pieces: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

    def take(self, piece: Piece | BaseException | None) -> None:
        """Called by the engine."""
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    async def whole(self) -> list[Piece]:
        """All of them."""
        return [piece async for piece in self]


async def _events(answer: _Told, writer: Writer, *, usage: bool) -> AsyncIterator[str]:
    """Server-sent events of an answer; if the client goes away, no more of it is made."""
    n_tokens = 0
    try:
        if (first := writer.first()) is not None:
            yield _event(first)
        async for piece in answer:
            n_tokens += len(piece.token_ids)
            if piece.text or piece.log_probs:
                yield _event(writer.piece(piece))
            if piece.reason is not None:
                yield _event(writer.last(piece.reason))
        if usage:
            yield _event(writer.usage(answer.stream.n_prompt_tokens, n_tokens))
        yield "data: [DONE]\n\n"
    except Exception as error:  # the response has begun: this is the only way to tell
        yield _event(error_body(str(error), "server_error"))
    finally:
        answer.stream.cancel()


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _described(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "saetools"}


def _unknown(name: str, models: Mapping[str, Any]) -> Any:
    from starlette.responses import JSONResponse

    known = ", ".join(models)
    return JSONResponse(error_body(f"no model {name!r}; there are {known}", "not_found_error", param="model"), 404)
