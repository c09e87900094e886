"""The page of one latent: what fires it, in base and tuned model side by side, and what it does."""

from __future__ import annotations

from typing import Any

from dash import dcc, html

from saetools.explore.page import Component, aria, heading, passages, table
from saetools.explore.workspace import Workspace
from saetools.report.latent_html import strongest
from saetools.report.latent_report import LatentReport
from saetools.report.latent_tables import context_tables, explained, headline, main_tables
from saetools.report.wording import visible

_COLOURS = ("#2563a8", "#c2410c", "#4d7c0f")
_LINK = "/latent/{}"


def layout(workspace: Workspace, latent: int) -> list[Component]:
    """The page.

    Raises:
        InputError: for a latent that there is not.
    """
    report = workspace.latent(latent)
    label = workspace.labels.of(latent)
    parts = [
        *heading(f"Latent {latent}"),
        html.Nav(
            [
                *([html.A("previous", href=_LINK.format(latent - 1), rel="prev")] if latent else []),
                *([html.A("next", href=_LINK.format(latent + 1), rel="next")] if latent + 1 < workspace.d_sae else []),
                html.A("steer it", href=f"/playground?latent={latent}"),
            ],
            className="steps",
            **aria(label="Latents"),
        ),
        html.Div(
            [
                html.Label("Label", htmlFor="label"),
                dcc.Input(id="label", type="text", value=label.label, maxLength=200),
                html.Label("Note", htmlFor="note"),
                dcc.Textarea(id="note", value=label.note, maxLength=10_000),
                html.Button("Save", id="save-label", n_clicks=0),
                html.Span(id="label-saved", className="note", role="status"),
            ],
            className="label",
        ),
        dcc.Store(id="latent", data=latent),
    ]
    if text := explained(report):
        parts.append(html.P(visible(text), className="explanation", dir="auto"))
    parts.append(html.P(headline(report)) if workspace.store is not None else _no_store(workspace))
    if figure := _histograms(report):
        parts.append(dcc.Graph(id="sizes", figure=figure, className="plot", config={"displaylogo": False}))
    parts += [table(found, link=_LINK) for found in main_tables(report)]
    if report.certificate is not None and workspace.certification is not None:
        parts += _doses(workspace, str(report.certificate["candidate"]))
    parts += _trajectory(workspace, latent)
    models, most = report.models, strongest(report)
    if report.record.top:
        parts += [html.H2("Largest activations"), passages(report.record.top, models, most)]
    for one in reversed(report.record.bins):
        if one.passages:
            title = f"{100 * one.low:.0f} to {100 * one.high:.0f} % of its active tokens, from weak to strong"
            parts.append(html.Details([html.Summary(title), passages(one.passages, models, most)]))
    if context := context_tables(report):
        parts += [html.H2("Where it fires, and its neighbours"), *(table(found, link=_LINK) for found in context)]
    return parts


def _no_store(workspace: Workspace) -> Component:
    command = f"saetools index --data corpus.jsonl --adapter ADAPTER --out {workspace.sources.run / 'store'}"
    return html.P(["Where it fires is not known: there is no latent store. Make one: ", html.Code(command)])


def _trajectory(workspace: Workspace, latent: int) -> list[Component]:
    """How it changed from checkpoint to checkpoint."""
    from saetools.explore.overview import styled

    if (found := workspace.trajectory) is None or latent >= found.means.shape[1]:
        return []
    import plotly.graph_objects as go
    import polars as pl

    x = [0.0, *found.points]
    curve = found.curves.filter(pl.col("latent") == latent).sort("point")
    figure = go.Figure()
    if len(curve):  # it was traced conversation by conversation
        low, high = ([0.0, *curve[name].fill_null(strategy="zero")] for name in ("low", "high"))
        band = {"fill": "toself", "fillcolor": "rgba(37,99,168,.2)", "line": {"width": 0}, "hoverinfo": "skip"}
        figure.add_trace(go.Scatter(x=[*x, *x[::-1]], y=[*high, *low[::-1]], showlegend=False, **band))
    means = [0.0, *found.means[:, latent].tolist()]
    figure.add_trace(go.Scatter(x=x, y=means, mode="lines+markers", line={"color": _COLOURS[0]}, showlegend=False))
    over = {"step": "training step", "scale": "adapter scale"}[found.over]
    figure.update_layout(xaxis_title=over, yaxis_title="change of mean activation")
    row = found.table.row(latent, named=True)
    told = f"As in the base up to {over} {row['onset']:g}" if row["onset"] is not None else "It does not move for sure"
    if row["onset_low"] is not None:
        told += f" [{row['onset_low']:g}, {row['onset_high']:g}]"
    told += f", then a {row['shape']}." if row["onset"] is not None else "."
    plot = dcc.Graph(id="trajectory", figure=styled(figure, height=240), className="plot")
    return [html.H2("Over the fine-tune"), html.P(told), plot]


def _doses(workspace: Workspace, candidate: str) -> list[Component]:
    from saetools.errors import InputError
    from saetools.explore.overview import styled

    assert workspace.certification is not None
    try:
        figure = styled(workspace.certification.figure(candidate))
    except InputError:  # it was not tested
        return []
    return [html.H2("Dose and response"), dcc.Graph(id="doses", figure=figure, className="plot")]


def _histograms(report: LatentReport) -> Any:
    import plotly.graph_objects as go

    from saetools.explore.overview import styled

    figure = go.Figure()
    for number, (model, one) in enumerate(report.histograms.items()):
        if n := sum(one.counts):
            heights = [count / n for count in one.counts]
            figure.add_trace(go.Bar(x=one.mids, y=heights, name=model, marker_color=_COLOURS[number % 3], opacity=0.6))
    if not figure.data:
        return None
    figure.update_layout(barmode="overlay", bargap=0, xaxis_title="activation where active", yaxis_title="share")
    return styled(figure, height=220)
