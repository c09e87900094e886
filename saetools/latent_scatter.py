"""A figure of latents: one dot each, some of them named, facts on hover."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import polars as pl


def scatter_latents(
    table: pl.DataFrame, x: str, y: str, *, named: Collection[int], hover: Sequence[str], titles: tuple[str, str]
) -> go.Figure:
    """One column of a table against another.

    Args:
        table: one row per dot, with `latent`, x and y.
        x: column of the horizontal axis.
        y: column of the vertical axis.
        named: latents whose number is written beside their dots.
        hover: text of each row, as HTML.
        titles: of the axes.
    """
    import plotly.graph_objects as go

    figure = go.Figure(
        go.Scattergl(
            x=table[x],
            y=table[y],
            mode="markers+text",
            text=[str(latent) if latent in named else "" for latent in table["latent"]],
            textposition="top center",
            hovertext=hover,
            hoverinfo="text",
            marker={"size": 6, "opacity": 0.6},
        )
    )
    figure.update_layout(
        xaxis_title=titles[0],
        yaxis_title=titles[1],
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
    )
    return figure
