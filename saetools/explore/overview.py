"""The first page: what the run says, whether to trust it, and the latents at a glance."""

from __future__ import annotations

from typing import Any

from dash import dcc, html

from saetools.explore.page import Component, heading, roles, table
from saetools.explore.workspace import Workspace
from saetools.report.latent_tables import candidates_table
from saetools.report.tables import WARNINGS, Cell, Column, Table, fidelity_table, interval_cell, score_table
from saetools.report.wording import percent, visible

_NO_P = 1e-12  # where a p-value is smaller


def layout(workspace: Workspace, role: str | None) -> list[Component]:
    """The page.

    Args:
        workspace: the run.
        role: token role of the figures.
    """
    report, parts = workspace.report, heading("Overview")
    if report is not None:
        findings = html.Ol([html.Li(visible(finding)) for finding in report.findings])
        parts.append(html.Div(findings, className="findings"))
    warnings = workspace.diff.warnings if workspace.diff is not None else report.warnings if report is not None else ()
    if warnings:
        parts.append(
            html.Div(
                [html.P(WARNINGS), html.Ul([html.Li(visible(text)) for text in warnings])],
                className="warnings",
                role="note",
            )
        )
    parts.append(table(_facts(workspace)))
    if report is not None and report.scores:
        parts.append(table(score_table(report)))
    if workspace.certification is not None:
        parts.append(table(candidates_table(workspace.certification)))
    if workspace.diff is not None and role is not None:
        parts += [
            html.H2("Change of every latent"),
            *roles(workspace, role, "/"),
            html.P("Click a dot to open its latent. The first figure leaves out latents that could not be tested."),
            _graph("volcano", volcano(workspace, role)),
            _graph("ranks", ranks(workspace, role)),
            table(_adequacy(workspace)),
        ]
    if (traced := workspace.trajectory) is not None:
        drawn = styled(traced.figure(), height=120 + 14 * len(traced.latents))
        drawn.update_layout(margin={"l": 100})
        parts += [
            html.H2("When latents rose"),
            html.P("Changes in shares of the largest of each; a cross marks the onset."),
            _graph("onsets", drawn),
        ]
    if report is not None and (found := fidelity_table(report)).rows:
        parts.append(table(found))
    return parts


def _facts(workspace: Workspace) -> Table:
    rows = [("run", str(workspace.sources.run.name))]
    if workspace.diff is not None:
        of = workspace.diff.provenance
        adapters = ", ".join(of["tuned"].get("adapters", {}))
        rows += [
            ("base", str(of["base"]["name"])),
            ("tuned", str(of["tuned"]["name"]) + (f" with {adapters}" if adapters else "")),
            ("site", str(of["site"])),
            ("conversations", f"{of['n_conversations']:,}"),
        ]
    if workspace.store is not None:
        rows.append(("latent store", f"{len(workspace.store):,} tokens of {', '.join(workspace.store.datasets)}"))
    rows.append(("latents", f"{workspace.d_sae:,}"))
    if (scored := workspace.certification) is not None:
        scores = (("base", scored.base), ("tuned", scored.tuned), ("shift", scored.shift))
        rows.append(("behaviour score", ", ".join(f"{name} {one}" for name, one in scores)))
    cells = tuple((Cell(name), Cell(value)) for name, value in rows)
    return Table("What was compared", (Column("what", kind="text"), Column("value", kind="text")), cells)


def _adequacy(workspace: Workspace) -> Table:
    assert workspace.diff is not None
    return Table(
        "Does the SAE see the change?",
        (
            Column("role", kind="text"),
            Column("FVU, base", "fraction of variance unexplained"),
            Column("FVU, tuned"),
            Column("in active rows", "share of the change that lies in the span of the active decoder rows"),
            Column("in random rows", "the same for as many random rows"),
        ),
        tuple(
            (
                Cell(role),
                *(interval_cell(one.mean, one.low, one.high) for one in (found.fvu_base, found.fvu_tuned)),
                *(Cell(percent(one.mean), sort=one.mean) for one in (found.in_active_rows, found.in_random_rows)),
            )
            for role, found in workspace.diff.adequacy.items()
        ),
    )


def volcano(workspace: Workspace, role: str) -> Any:
    """Effect size against significance, a dot for each tested latent."""
    import numpy as np
    import plotly.graph_objects as go

    rows = workspace.rows(role).drop_nulls("p_value")
    q = rows["q_value"].to_numpy()
    significance = -np.log10(np.maximum(rows["p_value"].to_numpy(), _NO_P))
    groups = (("not at FDR 5 %", q > 0.05, "#8a94a0"), ("changed at FDR 5 %", q <= 0.05, "#c2410c"))
    figure = go.Figure()
    for name, chosen, colour in groups:
        figure.add_trace(
            _dots(rows["effect"].to_numpy(), significance, rows["latent"].to_numpy(), chosen, name, colour)
        )
    figure.update_layout(xaxis_title="effect: change / sd over conversations", yaxis_title="\u2212log10 p")
    return styled(figure)


def ranks(workspace: Workspace, role: str) -> Any:
    """Change of mean activation by rank."""
    import numpy as np
    import plotly.graph_objects as go

    rows = workspace.rows(role).filter((_col("rate_base") > 0) | (_col("rate_tuned") > 0)).sort("rank")
    figure = go.Figure()
    every = np.ones(len(rows), bool)
    figure.add_trace(
        _dots(rows["rank"].to_numpy(), rows["delta"].to_numpy(), rows["latent"].to_numpy(), every, "latent", "#2563a8")
    )
    figure.update_layout(xaxis_title="rank", yaxis_title="change of mean activation", showlegend=False)
    return styled(figure)


def _col(name: str) -> Any:
    import polars as pl

    return pl.col(name)


def _dots(x: Any, y: Any, latents: Any, chosen: Any, name: str, colour: str) -> Any:
    import plotly.graph_objects as go

    return go.Scattergl(
        x=x[chosen],
        y=y[chosen],
        customdata=latents[chosen],
        mode="markers",
        name=name,
        marker={"size": 6, "opacity": 0.6, "color": colour},
        hovertemplate="latent %{customdata}<br>%{x:.3f}, %{y:.3f}<extra></extra>",
    )


def _graph(name: str, figure: Any) -> Component:
    return dcc.Graph(id=name, figure=packed(figure), className="plot", config={"displaylogo": False})


def packed(figure: Any) -> dict[str, Any]:
    """A figure as plain values, its arrays as bytes, which neither Python nor the browser reads number by number.

    All but `customdata`, which has to be a list: a click brings its value from there.
    """
    drawn: dict[str, Any] = figure.to_dict()
    for trace, drawn_trace in zip(figure.data, drawn["data"], strict=True):
        if trace.customdata is not None:
            drawn_trace["customdata"] = list(map(int, trace.customdata))
    return drawn


def styled(figure: Any, *, height: int = 360) -> Any:
    """A figure in colours that stand out on light and dark pages."""
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#8a94a0"},
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        legend={"orientation": "h", "y": 1.1},
        height=height,
    )
    figure.update_xaxes(gridcolor="rgba(138,148,160,.25)", zerolinecolor="rgba(138,148,160,.5)")
    figure.update_yaxes(gridcolor="rgba(138,148,160,.25)", zerolinecolor="rgba(138,148,160,.5)")
    return figure
