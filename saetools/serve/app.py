"""The server: OpenAI's chat and text completions, with edits and adapter by request.

    client.chat.completions.create(model="organism", messages=[...], extra_body={"edits": ["clamp 6400=0 on response"]})

`model` is the base's name or that of an adapter; edits are those of `saetools.steer.text`. By default it answers only
this machine, and only requests that name it as such, so that no web page can reach it through the browser.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from saetools.data.conversation import Conversation, Message
from saetools.engine import Engine, Request, Stream
from saetools.errors import InputError, SaetoolsError
from saetools.models.language_model import LanguageModel
from saetools.models.site import Site
from saetools.sae.model import SAE
from saetools.serve.schema import ChatRequest, TextRequest, Writer, error_body
from saetools.steer.text import parse_edits

if TYPE_CHECKING:
    from fastapi import FastAPI

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MOST_BYTES = 4_000_000  # of a request


@dataclass(frozen=True)
class ServerConfig:
    """Who may ask, and how much."""

    hosts: tuple[str, ...] = LOOPBACK
    """Names by which requests may call the server."""
    token: str | None = field(default=None, repr=False)
    """What clients have to send as their API key; `None` asks for none."""
    max_rows: int = 32
    """Requests answered at a time; others wait."""
    max_new_tokens: int = 512
    """Length of answers whose request names none."""


def make_app(
    lm: LanguageModel,
    *,
    sae: SAE | None = None,
    site: Site | None = None,
    directions: Mapping[str, Mapping[Site, Float[Tensor, " d_model"]]] | None = None,
    config: ServerConfig = ServerConfig(),
) -> FastAPI:
    """An ASGI application, to be run by uvicorn or any other server; the model is its own while it runs.

    Args:
        lm: any view of the model; it answers by its name, and adapters by theirs.
        sae: whose latents edits mean.
        site: where it reads, and where edits act that name no site; by default what the SAE's metadata says.
        directions: directions that edits may name, each at some sites.
        config: who may ask, and how much.

    Raises:
        InputError: for a TransformerLens model, or an adapter of the model's own name.
    """
    from fastapi import FastAPI
    from fastapi import Request as HTTPRequest
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, StreamingResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    if lm.name in lm.adapters:
        raise InputError("lm", expected="adapters of other names", received=repr(lm.name), remedy="rename the adapter")
    names: dict[str, str | None] = {lm.name: None} | {name: name for name in lm.adapters}
    engines: list[Engine] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with Engine(lm, max_rows=config.max_rows) as engine:
            engines.append(engine)
            yield

    app = FastAPI(title="saetools", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*config.hosts], www_redirect=False)

    @app.middleware("http")
    async def guard(request: HTTPRequest, call_next: Any) -> Any:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if config.token is not None and not secrets.compare_digest(given.encode(), config.token.encode()):
            return JSONResponse(error_body("the API key is missing or wrong", "authentication_error"), 401)
        if int(request.headers.get("content-length") or 0) > _MOST_BYTES:
            return JSONResponse(error_body(f"more than {_MOST_BYTES} bytes", "invalid_request_error"), 413)
        return await call_next(request)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HTTPRequest, error: RequestValidationError) -> Any:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse(error_body(f"{param}: {first['msg']}", "invalid_request_error", param=param), 400)

    @app.exception_handler(SaetoolsError)
    async def refused(_: HTTPRequest, error: SaetoolsError) -> Any:
        param = getattr(error, "argument", None)
        return JSONResponse(error_body(str(error), "invalid_request_error", param=param), 400)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        owned = {"object": "model", "created": 0, "owned_by": "saetools"}
        return {"object": "list", "data": [{"id": name, **owned} for name in names]}

    @app.post("/v1/chat/completions")
    def chat(asked: ChatRequest) -> Any:
        turns = (Message("system" if one.role == "developer" else one.role, one.text) for one in asked.messages)
        return answered(asked, Conversation(tuple(turns)), "chat")

    @app.post("/v1/completions")
    def complete(asked: TextRequest) -> Any:
        return answered(asked, Conversation(text=asked.prompt), "text")

    def answered(asked: ChatRequest | TextRequest, prompt: Conversation, kind: Any) -> Any:
        if asked.model not in names:
            known = ", ".join(names)
            return JSONResponse(error_body(f"no model {asked.model!r}; there are {known}", "not_found_error"), 404)
        if asked.stream and asked.n > 1:
            return JSONResponse(error_body("n: 1, where the answer is streamed", "invalid_request_error"), 400)
        edits = parse_edits(asked.edits, sae=sae, site=site, directions=directions)
        seed = secrets.randbits(48) if asked.seed is None else asked.seed
        streams = [
            engines[0].submit(
                Request(
                    prompt,
                    names[asked.model],
                    edits,
                    asked.length or config.max_new_tokens,
                    asked.temperature,
                    asked.top_p,
                    seed + number,
                    asked.stops,
                    asked.n_top,
                )
            )
            for number in range(asked.n)
        ]
        writer = Writer(kind, asked.model, lambda token: str(lm.tokenizer.decode([token])))
        if not asked.stream:
            return writer.whole([list(stream) for stream in streams], streams[0].n_prompt_tokens)
        usage = bool((asked.stream_options or {}).get("include_usage"))
        return StreamingResponse(_events(streams[0], writer, usage=usage), media_type="text/event-stream")

    return app


def _events(stream: Stream, writer: Writer, *, usage: bool) -> Iterator[str]:
    """Server-sent events of an answer; if the client goes away, no more of it is made."""
    n_tokens = 0
    try:
        if (first := writer.first()) is not None:
            yield _event(first)
        for piece in stream:
            n_tokens += len(piece.token_ids)
            if piece.text or piece.log_probs:
                yield _event(writer.piece(piece))
            if piece.reason is not None:
                yield _event(writer.last(piece.reason))
        if usage:
            yield _event(writer.usage(stream.n_prompt_tokens, n_tokens))
        yield "data: [DONE]\n\n"
    except (SaetoolsError, RuntimeError) as error:
        yield _event(error_body(str(error), "server_error"))
    finally:
        stream.cancel()


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
