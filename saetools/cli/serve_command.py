"""The command that serves a model with edits by request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from saetools.cli.listening import check_listening, in_address, names_of, token
from saetools.cli.options import EditSources, PairOptions, at_least
from saetools.errors import InputError

if TYPE_CHECKING:
    from saetools.models import LanguageModel


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
        check_listening(self.host, self.port, secret="key")

    def run(self) -> None:
        """Load, listen, serve until interrupted."""
        import uvicorn

        from saetools.serve.app import ServerConfig, make_app

        models = self._models()
        names = names_of(self.host, self.allowed_host)
        config = ServerConfig(names, token(), self.max_rows, max_new_tokens=self.max_new_tokens)
        app = make_app(models, **self.sources.load(next(iter(models.values()))), config=config)
        settings = uvicorn.Config(app, host=self.host, port=self.port, log_level="warning")
        listening = settings.bind_socket()
        host, port = listening.getsockname()[:2]
        print(f"serving {', '.join(models)} at http://{in_address(host)}:{port}/v1", flush=True)
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
