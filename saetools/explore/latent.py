"""The page of one latent: what fires it, in base and tuned model side by side, and what it does."""

from __future__ import annotations

from typing import Any

from dash import dcc, html

from saetools.explore.page import Component, aria, heading, passages, table
from saetools.explore.workspace import Workspace
from saetools.report.latent_html import strongest
from saetools.report.latent_report import LatentReport
from saetools.report.latent_tables import change_table, context_tables, explained, headline, main_tables
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
    if report is None:
        return [*parts, *_changes(workspace, latent), _no_store(workspace)]
    if text := explained(report):
        parts.append(html.P(visible(text), className="explanation", dir="auto"))
    parts.append(html.P(headline(report)))
    if figure := _histograms(report):
        parts.append(dcc.Graph(id="sizes", figure=figure, className="plot", config={"displaylogo": False}))
    parts += [table(found, link=_LINK) for found in main_tables(report)]
    if report.certificate is not None and workspace.certification is not None:
        parts += _doses(workspace, str(report.certificate["candidate"]))
    models, most = report.models, strongest(report)
    if report.record.top:
        parts += [html.H2("Largest activations"), passages(report.record.top, models, most)]
    for one in reversed(report.record.bins):
        if one.passages:
            title = f"{100 * one.low:.0f} to {100 * one.high:.0f} % of its active tokens, from weak to strong"
            parts.append(html.Details([html.Summary(title), passages(one.passages, models, most)]))
    parts.append(html.H2("Where it fires, and its neighbours"))
    return [*parts, *(table(found, link=_LINK) for found in context_tables(report))]


def _changes(workspace: Workspace, latent: int) -> list[Component]:
    from saetools.latents.record import LatentRecord

    if workspace.diff is None:
        return []
    import polars as pl

    rows = tuple(workspace.diff.table.filter(pl.col("latent") == latent).iter_rows(named=True))
    record = LatentRecord(latent, "", 0, 0, 0.0, (), (), (), (), (), ())
    return [table(change_table(LatentReport(record, {}, changes=rows)))]


def _no_store(workspace: Workspace) -> Component:
    command = f"saetools index --data corpus.jsonl --out {workspace.sources.run / 'store'}"
    return html.P(["Where it fires is not known: there is no latent store. Make one: ", html.Code(command)])


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
