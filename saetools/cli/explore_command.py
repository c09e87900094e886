"""The command that opens the explorer."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from saetools.cli.listening import check_listening, in_address, names_of, token
from saetools.cli.options import EditSources, PairOptions
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
    sources: EditSources = field(default_factory=EditSources)
    organism: str | None = None
    """In a run with several, such as of `saetools persona`, the one that is looked at; by default the first."""
    no_models: bool = False
    """Load none: no playground, no search by text, no map."""
    host: str = "127.0.0.1"
    """Address to listen at; one that other machines reach needs a token."""
    port: int = 8050
    """Port; 0 takes a free one."""
    allowed_host: tuple[str, ...] = ()
    """Further names by which browsers may call the server, such as that of a proxy."""

    def __post_init__(self) -> None:
        check_listening(self.host, self.port, secret="token")

    def run(self) -> None:
        """Open the run, listen, serve until interrupted."""
        try:
            import dash  # noqa: F401
            import dash_ag_grid  # noqa: F401
        except ImportError as error:
            raise InputError(
                "saetools explore", expected="dash", received="none", remedy="pip install 'saetools[explore]'"
            ) from error
        from saetools.explore.app import make_app, make_server

        workspace = self._workspace()
        listening = socket.create_server((self.host, self.port))
        port, key = listening.getsockname()[1], token()
        app = make_app(workspace, hosts=(self.host, *names_of(self.host, self.allowed_host)), token=key)
        place = f"http://{in_address(self.host)}:{port}/" + (f"?token={key}" if key else "")
        print(f"exploring {self.run_folder} at {place}", flush=True)
        try:
            make_server(app, listening).serve_forever()
        finally:
            workspace.close()

    def _workspace(self) -> Workspace:
        from saetools.explore import Sources, Workspace

        run = Sources.find(Path(self.run_folder), self.organism)
        if self.no_models:
            return Workspace(run)
        models = self._pair(run).voices()
        sae, site = self.sources.sae.load(models["base"])
        return Workspace(run, models, sae, site, self.sources.sae.sae, self.sources.folders())

    def _pair(self, run: Sources) -> PairOptions:
        """The models asked for; where none are, a run of the demo has its own."""
        from saetools.data import shipped_path
        from saetools.demo import ORGANISM
        from saetools.report import PersonaReport

        asked = self.models
        if run.report is None or asked.tuned is not None or asked.model.adapter:
            return asked
        made_by = str(PersonaReport.from_json(run.report).provenance.get("command", ""))
        if not made_by.startswith("saetools demo"):
            return asked
        return replace(asked, model=replace(asked.model, adapter=(f"organism={shipped_path(ORGANISM)}",)))
