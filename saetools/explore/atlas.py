"""The map of decoder rows: by the two components that vary most, or by UMAP, which keeps near ones together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from dash import dcc, html
from jaxtyping import Float
from torch import Tensor

from saetools.explore.overview import packed, styled
from saetools.explore.page import Component, choice, heading, roles
from saetools.explore.workspace import Workspace

COMPONENTS, UMAP = "principal components", "UMAP"
AXES = {COMPONENTS: ("first component", "second component"), UMAP: ("UMAP 1", "UMAP 2")}
_COLOURS = {"change": "delta", "density": "rate_base", "label": "label"}


def layout(workspace: Workspace, role: str | None) -> list[Component]:
    """The page."""
    if workspace.sae is None:
        return [*heading("Map"), html.P("The map needs the SAE: start the explorer with models.")]
    options = [name for name, column in _COLOURS.items() if column in workspace.rows(role).columns]
    by = choice("layout", "Places by", list(AXES), COMPONENTS)
    return [
        *heading("Map", "Decoder rows in the plane. Click a dot to open its latent."),
        *roles(workspace, role, "/map"),
        dcc.Store(id="map-role", data=role),
        html.Div([choice("colour", "Colour by", options, options[0]), by], className="controls"),
        html.Div(
            [html.Span(id="map-told", role="status"), html.Button("Stop", id="map-stop", n_clicks=0, hidden=True)],
            className="bar",
        ),
        dcc.Interval(id="map-tick", interval=1000, disabled=True),
        dcc.Loading(dcc.Graph(id="map", className="plot", config={"displaylogo": False, "scrollZoom": True})),
    ]


def principal_components(rows: Float[Tensor, "latent d_model"]) -> Float[Tensor, "latent 2"]:
    """The first two of unit rows, by an exact decomposition of their covariance."""
    unit = torch.nn.functional.normalize(rows.float(), dim=1)
    centred = unit - unit.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    places: Tensor = centred @ vectors[:, -2:].flip(1)
    return places


def figure(
    workspace: Workspace, places: Float[Tensor, "latent 2"], role: str | None, colour: str, layout: str = COMPONENTS
) -> dict[str, Any]:
    """The map, coloured by change, density, or whether there is a label."""
    import plotly.graph_objects as go
    import polars as pl

    rows = workspace.rows(role).sort("latent")
    column = _COLOURS[colour]
    values = ((rows["label"] != "") if column == "label" else rows[column]).cast(pl.Float32).to_numpy()
    most = float(np.sort(np.abs(values))[int(0.995 * (len(values) - 1))]) or 1.0  # a few large ones would hide the rest
    dots = go.Scattergl(
        x=places[:, 0].numpy(),
        y=places[:, 1].numpy(),
        customdata=rows["latent"].to_numpy(),
        mode="markers",
        text=[f": {label}".replace("<", "&lt;") if label else "" for label in rows["label"]],
        hovertemplate="latent %{customdata}%{text}<br>" + colour + " %{marker.color:.3f}<extra></extra>",
        marker={
            "size": 5,
            "opacity": 0.7,
            "color": values,
            "colorscale": "RdBu_r" if colour == "change" else "Viridis",
            "cmin": -most if colour == "change" else 0,
            "cmax": most,
            "colorbar": {"title": colour},
        },
    )
    drawn = styled(go.Figure(dots), height=620)
    x, y = AXES[layout]
    drawn.update_layout(xaxis_title=x, yaxis_title=y)
    return packed(drawn)
