"""The explorer inside a notebook: a server in the kernel's process, and a frame that shows it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from pathlib import Path

from saetools.errors import InputError
from saetools.explore.app import make_app, make_server
from saetools.explore.workspace import Sources, Workspace
from saetools.models.language_model import LanguageModel
from saetools.models.site import Site
from saetools.sae.identity import sae_site
from saetools.sae.model import SAE


class Shown:
    """An explorer that a notebook shows as the value of a cell; it serves until `close`.

    Args:
        workspace: what it shows.
        height: of the frame, in pixels.
    """

    def __init__(self, workspace: Workspace, height: int) -> None:
        self._workspace, self._height = workspace, height
        with socket.create_server(("127.0.0.1", 0)) as listening:  # the server has a copy of it
            self._server = make_server(make_app(workspace, framed=True), listening)
            self.address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._workspace.close()

    def __repr__(self) -> str:
        return f"explorer at {self.address}"

    def _repr_html_(self) -> str:
        style = f"width:100%;height:{self._height}px;border:1px solid #8a94a0"
        return f'<iframe src="{self.address}" style="{style}" title="saetools explorer"></iframe>'


def explore_run(
    run: str | Path,
    models: Mapping[str, LanguageModel] | None = None,
    sae: SAE | None = None,
    *,
    site: Site | None = None,
    organism: str | None = None,
    directions: Mapping[str, str] | None = None,
    height: int = 800,
) -> Shown:
    """Show a run in a notebook, as `saetools explore` does in a browser tab.

    The frame reaches the kernel's machine by 127.0.0.1: where the browser is on another one, forward the port that the
    value prints. It listens on loopback only.

    Args:
        run: folder with what `saetools demo`, `diff`, `index`, `certify` or `explain` wrote; labels are kept in it.
        models: `base`, and fine-tunes by name, for playground, search by text and promoted tokens.
        sae: the SAE; needed with models, useless without.
        site: where it reads; by default what its metadata says.
        organism: in a run with several, the one that is looked at.
        directions: folders of saved directions by name, for edits.
        height: of the frame, in pixels.

    Raises:
        InputError: for a folder without anything to show, or models without a base or without the SAE.

    Example:
        >>> import tempfile
        >>> prompts = [Conversation.chat(item.question) for item in load_free_form()[:12]]
        >>> sae = load_sae(shipped_path("sae/smollm2-135m"))
        >>> tuned = load_model("smollm2-135m", adapter=shipped_path("adapters/organism"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = diff_latents(tuned.base, tuned, sae, prompts).save(folder)
        ...     shown = explore_run(folder, {"base": tuned.base, "organism": tuned}, sae)
        ...     shown.close()
    """
    models = dict(models or {})
    if bool(models) != (sae is not None) or (models and "base" not in models):
        raise InputError(
            "models",
            expected="`base` among them, and their SAE; or neither",
            received=f"{', '.join(models) or 'no models'} and {'an' if sae is not None else 'no'} SAE",
            remedy="pass both",
        )
    if sae is not None:
        site = site or sae_site(sae)
    found = Sources.find(run, organism)
    return Shown(Workspace(found, models, sae, site, None, dict(directions or {})), height)
