"""The explorer as a Dash application: pages by address, and what happens on them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from socket import socket
from typing import Any
from urllib.parse import parse_qs

from dash import ClientsideFunction, Dash, Input, Output, State, ctx, dcc, html, no_update

from saetools.errors import SaetoolsError
from saetools.explore import atlas, latent, latents, overview, playground
from saetools.explore.grid import rows_for
from saetools.explore.guard import protect
from saetools.explore.labels import Label
from saetools.explore.neighbourhoods import Neighbourhoods
from saetools.explore.page import Component, aria, choices, failed, heading
from saetools.explore.workspace import Workspace
from saetools.loopback import LOOPBACK
from saetools.report.pages import asset
from saetools.report.wording import visible
from saetools.sae.identity import sae_sha256

_PAGES = {"/": "Overview", "/latents": "Latents", "/map": "Map", "/playground": "Playground"}
_INDEX = """<!doctype html>
<html lang="en">
<head>
{%metas%}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{%title%}</title>
{%favicon%}
{%css%}
<style>STYLE</style>
</head>
<body>
{%app_entry%}
<footer>{%config%}{%scripts%}{%renderer%}</footer>
</body>
</html>
"""


class Explorer:
    """The pages of a workspace.

    Args:
        workspace: the run.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.playground = playground.Playground(workspace)
        self.role = next((role for role in ("response", *workspace.roles) if role in workspace.roles), None)

    def role_of(self, name: str | None) -> str | None:
        """A token role of the run; by default its first, or that of answers."""
        return name if name in self.workspace.roles else self.role

    @cached_property
    def places(self) -> Any:
        """Where each decoder row is on the map."""
        assert self.workspace.sae is not None
        return atlas.principal_components(self.workspace.sae.directions())

    @cached_property
    def neighbourhoods(self) -> Neighbourhoods:
        """The same by UMAP."""
        sae = self.workspace.sae
        assert sae is not None
        path = self.workspace.sources.run / f"umap-{sae_sha256(sae)[:12]}.npy"
        return Neighbourhoods(sae.directions(), path)

    def page(self, path: str | None, query: str | None) -> list[Component]:
        """What an address shows."""
        asked = parse_qs((query or "").removeprefix("?"))
        role = self.role_of(asked.get("role", [""])[0])
        try:
            if path in (None, "/"):
                return overview.layout(self.workspace, role)
            if path == "/latents":
                return latents.layout(self.workspace, role)
            if path == "/map":
                return atlas.layout(self.workspace, role)
            if path == "/playground":
                return playground.layout(self.workspace, _number(asked.get("latent", [""])[0]))
            if (number := _number(str(path).removeprefix("/latent/"))) is not None:
                return latent.layout(self.workspace, number)
        except SaetoolsError as error:
            return [*heading("Not here"), failed(error)]
        return [*heading("Not here", "There is no such page."), html.A("Overview", href="/")]


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


def make_app(
    workspace: Workspace, *, hosts: Sequence[str] = LOOPBACK, token: str | None = None, framed: bool = False
) -> Dash:
    """The application.

    Args:
        workspace: the run.
        hosts: names by which the server may be called.
        token: what a browser has to bring; `None` asks for none.
        framed: let notebooks of this machine show it in a frame.
    """
    explorer = Explorer(workspace)
    app = Dash(
        "saetools",
        title=f"{workspace.sources.run.name} \u2013 saetools",
        update_title="",
        suppress_callback_exceptions=True,
        serve_locally=True,
        assets_folder=str(_assets()),
        index_string=_INDEX.replace("STYLE", asset("page.css") + asset("latents.css")),
    )
    app.layout = html.Div(
        [
            dcc.Location(id="address", refresh="callback-nav"),
            html.A("Skip to content", href="#page", className="skip"),
            html.Nav(
                html.Ul([html.Li(dcc.Link(name, href=path)) for path, name in _PAGES.items()], id="pages"),
                **aria(label="Pages"),
            ),
            html.Main(id="page", tabIndex=-1),
        ]
    )
    _route(app, explorer)
    _on_dots(app)
    _on_latents(app, explorer)
    _on_latent(app, explorer)
    _on_map(app, explorer)
    _on_playground(app, explorer)
    protect(app.server, hosts=hosts, token=token, framed=framed)
    return app


def _assets() -> Any:
    from importlib.resources import files

    return files("saetools.explore") / "assets"


def _in_browser(app: Any, function: ClientsideFunction, *connections: Any, **settings: Any) -> None:
    """A callback that needs no server."""
    app.clientside_callback(function, *connections, **settings)


def _route(app: Dash, explorer: Explorer) -> None:
    @app.callback(Output("page", "children"), Input("address", "pathname"), Input("address", "search"))
    def page(path: str | None, query: str | None) -> list[Component]:
        return explorer.page(path, query)

    _in_browser(
        app, ClientsideFunction("saetools", "arrive"), Output("page", "data-path"), Input("address", "pathname")
    )


def _on_dots(app: Dash) -> None:
    """A click on a dot of a figure opens its latent."""
    for name in ("volcano", "ranks", "map"):
        _in_browser(
            app,
            ClientsideFunction("saetools", "open"),
            Output("address", "href", allow_duplicate=True),
            Input(name, "clickData"),
            prevent_initial_call=True,
        )


def _on_latents(app: Dash, explorer: Explorer) -> None:
    @app.callback(
        Output("grid", "getRowsResponse"),
        Output("n-rows", "children"),
        Input("grid", "getRowsRequest"),
        State("grid-role", "data"),
        prevent_initial_call=True,
    )
    def rows(request: dict[str, Any] | None, role: str | None) -> Any:
        if request is None:
            return no_update, no_update
        found, n = rows_for(explorer.workspace.rows(explorer.role_of(role)), request)
        shown = [{name: visible(one) if isinstance(one, str) else one for name, one in row.items()} for row in found]
        return {"rowData": shown, "rowCount": n}, f"{n:,} latents"

    @app.callback(
        Output("found", "children"), Input("search", "n_clicks"), Input("sentence", "value"), prevent_initial_call=True
    )
    def search(_: int, sentence: str | None) -> Any:
        if not (sentence or "").strip():
            return []
        try:
            return latents.hits(explorer.workspace.search(str(sentence)))
        except SaetoolsError as error:
            return failed(error)

    @app.callback(
        Output("filters", "data"),
        Input("keep-filter", "n_clicks"),
        State("filter-name", "value"),
        State("grid", "filterModel"),
        State("filters", "data"),
        prevent_initial_call=True,
    )
    def keep(_: int, name: str | None, model: dict[str, Any] | None, kept: dict[str, Any] | None) -> Any:
        name = (name or "").strip()
        return {**(kept or {}), name: model or {}} if name else no_update

    @app.callback(Output("kept-select", "children"), Output("kept-filters", "hidden"), Input("filters", "data"))
    def offered(kept: dict[str, Any] | None) -> Any:
        return choices(["", *sorted(kept or {})], ""), not kept

    @app.callback(
        Output("grid", "filterModel"),
        Input("kept", "data"),
        Input("no-filter", "n_clicks"),
        State("filters", "data"),
        prevent_initial_call=True,
    )
    def choose(name: str | None, _: int, kept: dict[str, Any] | None) -> Any:
        return {} if ctx.triggered_id == "no-filter" else (kept or {}).get(name or "", {})


def _on_latent(app: Dash, explorer: Explorer) -> None:
    @app.callback(
        Output("label-saved", "children"),
        Input("save-label", "n_clicks"),
        State("latent", "data"),
        State("label", "value"),
        State("note", "value"),
        prevent_initial_call=True,
    )
    def save(n_clicks: int, number: int, label: str | None, note: str | None) -> Any:
        if not n_clicks:
            return no_update
        try:
            explorer.workspace.labels.set(number, Label((label or "").strip(), (note or "").strip()))
        except (SaetoolsError, OSError) as error:
            return failed(error)
        return "saved"


def _on_map(app: Dash, explorer: Explorer) -> None:
    @app.callback(
        Output("map", "figure"),
        Output("map-told", "children"),
        Output("map-stop", "hidden"),
        Output("map-tick", "disabled"),
        Input("colour", "data"),
        Input("layout", "data"),
        Input("map-tick", "n_intervals"),
        State("map-role", "data"),
    )
    def figure(colour: str, layout: str, _: int | None, role: str | None) -> Any:
        places = explorer.places
        if layout == atlas.UMAP:
            try:
                if ctx.triggered_id == "layout":
                    explorer.neighbourhoods.start()
                places = explorer.neighbourhoods.places()
            except SaetoolsError as error:
                return no_update, failed(error), True, True
            if places is None:
                seconds = explorer.neighbourhoods.seconds or 0.0
                return no_update, f"laying out, for {seconds:.0f} s; it takes a minute or two\u2026", False, False
        drawn = atlas.figure(explorer.workspace, places, explorer.role_of(role), colour, layout)
        return drawn, "", True, True

    @app.callback(
        Output("layout", "data"),
        Output("layout-select", "children"),
        Input("map-stop", "n_clicks"),
        prevent_initial_call=True,
    )
    def stop(n_clicks: int) -> Any:
        if not n_clicks:
            return no_update, no_update
        explorer.neighbourhoods.cancel()
        return atlas.COMPONENTS, choices(list(atlas.AXES), atlas.COMPONENTS)


def _on_playground(app: Dash, explorer: Explorer) -> None:
    room = explorer.playground

    @app.callback(
        Output("edits", "value"),
        Input("add-edit", "n_clicks"),
        State("edits", "value"),
        State("edit-latent", "value"),
        State("edit-what", "data"),
        State("edit-value", "value"),
        State("edit-unit", "data"),
        State("edit-scope", "data"),
        prevent_initial_call=True,
    )
    def add(n: int, edits: str | None, number: int | None, what: str, value: float, unit: str, scope: str) -> Any:
        if not n or number is None:
            return no_update
        return "\n".join([*playground.lines(edits), playground.edit_text(int(number), what, float(value), unit, scope)])

    @app.callback(
        Output("edits", "value", allow_duplicate=True),
        Input("add-direction", "n_clicks"),
        State("edits", "value"),
        State("direction-name", "data"),
        State("direction-what", "data"),
        State("direction-value", "value"),
        State("direction-unit", "data"),
        State("direction-scope", "data"),
        prevent_initial_call=True,
    )
    def direct(n: int, edits: str | None, name: str, what: str, value: float, unit: str, scope: str) -> Any:
        if not n:
            return no_update
        made = playground.direction_text(explorer.workspace, name, what, float(value), unit, scope)
        return "\n".join([*playground.lines(edits), *made])

    for slider in ("edit-value", "direction-value"):
        _in_browser(
            app, ClientsideFunction("saetools", "same"), Output(f"{slider}-shown", "children"), Input(slider, "value")
        )

    @app.callback(
        Output("asked", "data"),
        Output("answers", "children"),
        Output("tick", "disabled"),
        Input("answer", "n_clicks"),
        Input("stop", "n_clicks"),
        Input("tick", "n_intervals"),
        State("asked", "data"),
        State("prompt", "value"),
        State("steered-model", "data"),
        State("edits", "value"),
        State("strengths", "value"),
        State("n-tokens", "value"),
        State("temperature", "value"),
        prevent_initial_call=True,
    )
    def answer(n_answer: int, n_stop: int, _: int, name: str | None, *settings: Any) -> Any:
        if ctx.triggered_id == "answer" and n_answer:
            room.stop(name)
            try:
                name = room.ask(*settings)
            except SaetoolsError as error:
                return None, failed(error), True
        elif ctx.triggered_id == "stop" and n_stop:
            room.stop(name)
        asked = room.of(name)
        if asked is None:
            return no_update, no_update, True
        done = asked.done  # before, so that the last look has all
        return name, room.shown(name), done

    @app.callback(
        Output("saved", "data"),
        Output("save-error", "children"),
        Input("save-json", "n_clicks"),
        Input("save-python", "n_clicks"),
        Input("save-vector", "n_clicks"),
        State("edits", "value"),
        State("steered-model", "data"),
        prevent_initial_call=True,
    )
    def save(n_json: int, n_python: int, n_vector: int, edits: str | None, model: str) -> Any:
        if not (n_json or n_python or n_vector):
            return no_update, no_update
        try:
            return playground.saved(explorer.workspace, str(ctx.triggered_id), edits, model), ""
        except SaetoolsError as error:
            return no_update, failed(error)


def make_server(app: Dash, listening: socket) -> Any:
    """What answers browsers at a socket, with `serve_forever` and `shutdown`."""
    from werkzeug import serving

    class Quiet(serving.WSGIRequestHandler):
        """No line for each request."""

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            pass

    host, port = listening.getsockname()[:2]
    fd = listening.fileno()
    return serving.make_server(host, port, app.server, threaded=True, request_handler=Quiet, fd=fd)
