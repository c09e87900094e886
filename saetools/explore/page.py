"""Pieces that several pages of the explorer are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dash import dcc, html

from saetools.explore.workspace import Workspace
from saetools.latents.passage import Passage
from saetools.report.latent_html import shaded
from saetools.report.tables import Cell, Table
from saetools.report.wording import number, visible

Component = Any


def aria(**values: str) -> dict[str, Any]:
    """Properties for assistive technology, by their names without `aria-`."""
    return {f"aria-{name}": value for name, value in values.items()}


def heading(title: str, intro: str = "") -> list[Component]:
    """Title and first words of a page."""
    return [html.H1(title), *([html.P(intro)] if intro else [])]


def roles(workspace: Workspace, role: str | None, path: str) -> list[Component]:
    """Links to the same page at other token roles, if there are some.

    Args:
        workspace: the run.
        role: the one that is shown.
        path: of the page.
    """
    if len(workspace.roles) < 2:
        return []
    links = [
        html.A(one, href=f"{path}?role={one}", **(aria(current="true") if one == role else {}))
        for one in workspace.roles
    ]
    return [html.Nav(["Tokens: ", *links], className="steps", **aria(label="Token roles"))]


def table(value: Table, *, link: str | None = None) -> Component:
    """A table with its caption and hints.

    Args:
        value: the table.
        link: where numbers in a column called latent lead, with `{}` for the number.
    """
    hints = [html.Span([html.B(column.name), f" {column.hint}. "]) for column in value.columns if column.hint]
    head = html.Tr([html.Th(column.name, scope="col", className=column.kind) for column in value.columns])
    rows = []
    for row in value.rows:
        cells: list[Component] = []
        for place, (cell, column) in enumerate(zip(row, value.columns, strict=True)):
            shown = _cell(cell, link if column.name == "latent" else None)
            if place == 0:
                cells.append(html.Th(shown, scope="row", className=column.kind))
            else:
                cells.append(html.Td(shown, className=column.kind))
        rows.append(html.Tr(cells))
    body = html.Table([html.Caption(value.caption), html.Thead(head), html.Tbody(rows)])
    return html.Div(
        [
            html.Div(body, className="scroll", tabIndex=0, role="region", **aria(label=value.caption)),
            *([html.P(hints, className="hint")] if hints else []),
        ]
    )


def _cell(cell: Cell, link: str | None) -> list[Component]:
    if cell.tokens:
        return [part for token in cell.tokens for part in (html.Code(token), " ")]
    if link is not None:
        return [html.A(cell.text, href=link.format(cell.text))]
    return [visible(cell.text), *([html.Span(f" {cell.detail}", className="detail")] if cell.detail else [])]


def passages(some: Sequence[Passage], models: Sequence[str], most: float) -> Component:
    """Passages with every active token shaded, once for each model."""
    return html.Div([_passage(one, models, most) for one in some], className="passages")


def _passage(passage: Passage, models: Sequence[str], most: float) -> Component:
    where = f"{passage.dataset}, {passage.document_id or passage.document}, from token {passage.start}"
    texts = [
        html.P(
            marked(list(shaded(passage, model, most)), passage.peak),
            dir="auto",
            **_model_of(model if len(models) > 1 else None),
        )
        for model in models
    ]
    return html.Div([html.P(visible(where), className="note"), html.Div(texts, className="pair")], className="passage")


def _model_of(model: str | None) -> dict[str, Any]:
    return {} if model is None else {"data-model": model}


def marked(tokens: Sequence[tuple[str, float, int]], peak: int | None = None) -> list[Component]:
    """Tokens as text, those with a level of colour in marks that tell their activation."""
    parts: list[Component] = []
    for place, (token, act, level) in enumerate(tokens):
        text = visible(token.replace("\r", ""))
        if level:
            kind = f"a{level} peak" if place == peak else f"a{level}"
            parts.append(html.Mark(text, className=kind, title=number(act, 2)))
        elif parts and isinstance(parts[-1], str):
            parts[-1] += text
        else:
            parts.append(text)
    return parts


def choice(name: str, title: str, options: Sequence[str], value: str) -> Component:
    """One of a few, by a select element; what is chosen is the `data` of a store of this name.

    Args:
        name: of the store; the element is called `{name}-select`.
        title: what is chosen.
        options: to choose from.
        value: what is chosen first.
    """
    select = html.Select(choices(options, value), id=f"{name}-select", **_store_of(name))
    label = html.Label(title, htmlFor=f"{name}-select")
    return html.Div([label, select, dcc.Store(id=name, data=value)], className="field")


def choices(options: Sequence[str], value: str) -> list[Component]:
    """Options of a select element."""
    return [html.Option(visible(one), value=one, selected=one == value) for one in options]


def _store_of(name: str) -> dict[str, Any]:
    return {"data-store": name}


def failed(error: Exception) -> Component:
    """What went wrong, in the place of a result."""
    return html.P(visible(str(error)), className="error", role="alert")
