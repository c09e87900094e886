"""The table of all latents, sorted and filtered on the server."""

from __future__ import annotations

from typing import Any

from dash import dcc, html

from saetools.explore.page import Component, aria, choice, heading, marked, roles
from saetools.explore.workspace import Workspace
from saetools.interpret.text_search import TextHit, TextSearch
from saetools.report.latent_html import level_of
from saetools.report.tables import Column, Table
from saetools.report.wording import number

_BLOCK = 100  # rows that the grid asks for at a time
_PAUSE = 60  # milliseconds after a key before rows are filtered
_NUMBERS = (
    "delta",
    "low",
    "high",
    "effect",
    "q_value",
    "rate_base",
    "rate_tuned",
    "mean_base",
    "mean_tuned",
    "n_active",
)
_NAMES = {
    "latent": "latent",
    "label": "label",
    "delta": "delta",
    "low": "low",
    "high": "high",
    "effect": "effect",
    "q_value": "q",
    "rate_base": "fires, base",
    "rate_tuned": "fires, tuned",
    "mean_base": "mean, base",
    "mean_tuned": "mean, tuned",
    "n_active": "active in",
    "rank": "rank",
    "verdict": "verdict",
    "explanation": "explanation",
}
_SHOWN = {"rate_base": ".2%", "rate_tuned": ".2%", "q_value": ".2g", "n_active": ",d"}


def layout(workspace: Workspace, role: str | None) -> list[Component]:
    """The page, with the changes at one token role."""
    from dash_ag_grid import AgGrid

    return [
        *heading("Latents", "Click a number to open its latent; name filters to keep them."),
        *roles(workspace, role, "/latents"),
        dcc.Store(id="grid-role", data=role),
        html.Div(
            [
                dcc.Input(
                    id="sentence", type="text", placeholder="Which latents fire on this sentence?", debounce=True
                ),
                html.Button("Search", id="search", n_clicks=0),
            ],
            className="bar",
            hidden=not workspace.models,
        ),
        dcc.Loading(html.Div(id="found", **aria(live="polite"))),
        html.Div(
            [
                dcc.Input(id="filter-name", type="text", placeholder="Name these filters"),
                html.Button("Keep", id="keep-filter", n_clicks=0),
                html.Button("All latents", id="no-filter", n_clicks=0),
                html.Span(id="n-rows", className="note", **aria(live="polite")),
            ],
            className="bar",
        ),
        html.Div(choice("kept", "Kept filters", [""], ""), id="kept-filters", hidden=True),
        dcc.Store(id="filters", storage_type="local", data={}),
        AgGrid(
            id="grid",
            columnDefs=columns(workspace),
            rowModelType="infinite",
            defaultColDef={
                "sortable": True,
                "resizable": True,
                "filter": True,
                "floatingFilter": True,
                "filterParams": {"debounceMs": _PAUSE},
            },
            dashGridOptions={
                "cacheBlockSize": _BLOCK,
                "maxBlocksInCache": 20,
                "ensureDomOrder": True,
                "suppressColumnVirtualisation": True,
            },
            className="ag-theme-quartz-auto-dark",
            style={"height": "70vh"},
        ),
    ]


def columns(workspace: Workspace) -> list[dict[str, Any]]:
    """The columns that the run has, as AG Grid takes them."""
    role = workspace.roles[0] if workspace.roles else None
    here = workspace.rows(role).columns
    found = []
    for name, shown in _NAMES.items():
        if name not in here:
            continue
        column: dict[str, Any] = {"field": name, "headerName": shown, "width": 120}
        if name in _NUMBERS or name in ("latent", "rank"):
            column |= {"filter": "agNumberColumnFilter", "type": "rightAligned"}
        if name in _NUMBERS:
            spec = _SHOWN.get(name, ".3f")
            column["valueFormatter"] = {
                "function": f"params.value == null ? '' : d3.format('{spec}')(params.value)".replace(",d", ",")
            }
        if name == "delta":
            column["sort"] = "desc"
        if name == "latent":
            column |= {"cellRenderer": "LatentLink", "pinned": "left", "width": 100}
        if name in ("label", "explanation", "verdict"):
            column |= {"filter": "agTextColumnFilter", "width": 300 if name == "explanation" else 140}
        found.append(column)
    return found


def hits(found: TextSearch) -> list[Component]:
    """Latents that fire on a text, the first shown on its tokens."""
    if not found.hits:
        return [html.P("No latent fires on it.", className="note")]
    models = list(found.hits[0].values)
    table = Table(
        f"{len(found.hits)} of {found.n_active:,} latents that fire on it",
        (Column("latent"), *(Column(model, kind="number") for model in models), Column("where", kind="text")),
        (),
    )
    head = html.Tr([html.Th(column.name, scope="col", className=column.kind) for column in table.columns])
    rows = [
        html.Tr(
            [
                html.Th(html.A(str(hit.latent), href=f"/latent/{hit.latent}"), scope="row"),
                *(html.Td(number(hit.values[model], 2), className="number") for model in models),
                html.Td(marked(_shaded(found.tokens, hit)), className="text"),
            ]
        )
        for hit in found.hits
    ]
    body = html.Table([html.Caption(table.caption), html.Thead(head), html.Tbody(rows)])
    return [html.Div(body, className="scroll hits", tabIndex=0, role="region", **aria(label=table.caption))]


def _shaded(tokens: tuple[str, ...], hit: TextHit) -> list[tuple[str, float, int]]:
    acts = hit.acts[list(hit.acts)[-1]]
    most = max(map(abs, acts), default=0.0)
    return [(token, act, level_of(act, most)) for token, act in zip(tokens, acts, strict=True)]
