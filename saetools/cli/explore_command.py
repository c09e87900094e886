"""The command that opens the explorer."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from saetools.cli.options import PairOptions, SAEOptions
from saetools.cli.serve_command import TOKEN_VARIABLE, is_loopback
from saetools.errors import InputError

if TYPE_CHECKING:
    from saetools.explore import Sources, Workspace


@dataclass(frozen=True)
class Explore:
    """Look at a run in the browser: latents, what fires them, what they do, and a playground for edits."""

    run_folder: Annotated[str, tyro.conf.Positional]
    """Folder of the run, with what `saetools demo`, `diff`, `index`, `certify` and `explain` wrote into it or into
    folders in it; labels are kept there."""
    models: PairOptions = field(default_factory=PairOptions)
    """Those that answer in the playground; a run of the demo brings its own."""
    sae: SAEOptions = field(default_factory=SAEOptions)
    no_models: bool = False
    """Load none: no playground, no search by text, no map."""
    host: str = "127.0.0.1"
    """Address to listen at; one that other machines reach needs a token."""
    port: int = 8050
    """Port; 0 takes a free one."""
    allowed_host: tuple[str, ...] = ()
    """Further names by which browsers may call the server, such as that of a proxy."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise InputError("--port", expected="0 to 65535", received=self.port, remedy="pick another")
        if not is_loopback(self.host) and not os.environ.get(TOKEN_VARIABLE):
            raise InputError(
                "--host",
                expected=f"this machine, such as 127.0.0.1, or a token in {TOKEN_VARIABLE}",
                received=f"{self.host} without a token",
                remedy=f"set {TOKEN_VARIABLE}: whoever reaches the address can use the model",
            )

    def run(self) -> None:
        """Open the run, listen, serve until interrupted."""
        try:
            import dash  # noqa: F401
            import dash_ag_grid  # noqa: F401
        except ImportError as error:
            raise InputError(
                "saetools explore", expected="dash", received="none", remedy="pip install 'saetools[explore]'"
            ) from error
        from saetools.explore.app import LOOPBACK, make_app, serve

        workspace = self._workspace()
        token = os.environ.get(TOKEN_VARIABLE) or None
        listening = socket.create_server((self.host, self.port))
        port = listening.getsockname()[1]
        everywhere = ("*",) if token is not None and not is_loopback(self.host) else ()  # the token says who may look
        app = make_app(workspace, hosts=(*LOOPBACK, self.host, *self.allowed_host, *everywhere), token=token)
        name = f"[{self.host}]" if ":" in self.host else self.host
        print(
            f"exploring {self.run_folder} at http://{name}:{port}/" + (f"?token={token}" if token else ""), flush=True
        )
        try:
            serve(app, listening)
        finally:
            workspace.close()

    def _workspace(self) -> Workspace:
        from saetools.explore import Sources, Workspace

        sources = Sources.find(Path(self.run_folder))
        if self.no_models:
            return Workspace(sources)
        models = self._pair(sources).voices()
        sae, site = self.sae.load(models["base"])
        return Workspace(sources, models, sae, site, self.sae.sae)

    def _pair(self, sources: Sources) -> PairOptions:
        """The models asked for; where none are, a run of the demo has its own."""
        from saetools.data import shipped_path
        from saetools.demo import ORGANISM
        from saetools.report import PersonaReport

        asked = self.models
        if sources.report is None or asked.tuned is not None or asked.model.adapter:
            return asked
        made_by = str(PersonaReport.from_json(sources.report).provenance.get("command", ""))
        if not made_by.startswith("saetools demo"):
            return asked
        return replace(asked, model=replace(asked.model, adapter=(f"organism={shipped_path(ORGANISM)}",)))
