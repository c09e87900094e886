"""The command that serves a model with edits by request."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from saetools.cli.options import EditSources, PairOptions, at_least
from saetools.errors import InputError

if TYPE_CHECKING:
    from saetools.models import LanguageModel

TOKEN_VARIABLE = "SAETOOLS_TOKEN"


@dataclass(frozen=True)
class Serve:
    """Serve a model as OpenAI does, with edits and adapter by request; its API key is read from SAETOOLS_TOKEN."""

    models: PairOptions = field(default_factory=PairOptions)
    sources: EditSources = field(default_factory=EditSources)
    host: str = "127.0.0.1"
    """Address to listen at; one that other machines reach needs a key."""
    port: int = 8000
    """Port; 0 takes a free one."""
    allowed_host: tuple[str, ...] = ()
    """Further names by which requests may call the server, such as that of a proxy."""
    max_rows: int = 32
    """Requests answered at a time."""
    max_new_tokens: int = 512
    """Length of answers whose request names none."""

    def __post_init__(self) -> None:
        at_least(1, "--max-rows", self.max_rows)
        at_least(1, "--max-new-tokens", self.max_new_tokens)
        if not 0 <= self.port < 65536:
            raise InputError("--port", expected="0 to 65535", received=self.port, remedy="pick another")
        if not is_loopback(self.host) and not os.environ.get(TOKEN_VARIABLE):
            raise InputError(
                "--host",
                expected=f"this machine, such as 127.0.0.1, or a key in {TOKEN_VARIABLE}",
                received=f"{self.host} without a key",
                remedy=f"set {TOKEN_VARIABLE}: whoever reaches the address can use the model",
            )

    def run(self) -> None:
        """Load, listen, serve until interrupted."""
        import uvicorn

        from saetools.serve.app import LOOPBACK, ServerConfig, make_app

        models = self._models()
        token = os.environ.get(TOKEN_VARIABLE) or None
        everywhere = ("*",) if token is not None and not is_loopback(self.host) else ()  # the key says who may ask
        config = ServerConfig(
            (*LOOPBACK, *self.allowed_host, *everywhere), token, self.max_rows, max_new_tokens=self.max_new_tokens
        )
        app = make_app(models, **self.sources.load(next(iter(models.values()))), config=config)
        settings = uvicorn.Config(app, host=self.host, port=self.port, log_level="warning")
        listening = settings.bind_socket()
        host, port = listening.getsockname()[:2]
        place = f"[{host}]" if ":" in host else host
        print(f"serving {', '.join(models)} at http://{place}:{port}/v1", flush=True)
        uvicorn.Server(settings).run(sockets=[listening])

    def _models(self) -> dict[str, LanguageModel]:
        """The base by its own name, and the fine-tunes by theirs."""
        voices = self.models.voices()
        base = voices.pop("base")
        if base.name in voices:
            raise InputError(
                "--adapter", expected=f"other names than {base.name!r}", received=base.name, remedy="rename it"
            )
        return {base.name: base, **voices}


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
