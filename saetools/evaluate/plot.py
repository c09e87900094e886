"""Dose and response as a figure: behaviour beside its random controls, or coherence over many strengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saetools.errors import InputError
from saetools.evaluate.dose import DoseResponse
from saetools.evaluate.sweep import UNEDITED, Sweep

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Near Okabe and Ito's palette, which colour-blind readers tell apart.
_EDIT, _NORM, _COST, _GREY, _BLUE = "#d55e00", "#168f7a", "#9168d6", "#7d8590", "#2680c2"
_CONTROLS = {
    "none": ("the edit", _EDIT, "solid"),
    "equal_norm": ("random, equal norm", _NORM, "dot"),
    "equal_perplexity": ("random, equal perplexity", _COST, "dash"),
}
_SHARES = {
    "incoherent": ("incoherent", _EDIT, "solid"),
    "refused": ("refused", _COST, "dash"),
    "other_language": ("another language", _NORM, "dot"),
}


def plot_dose_response(result: DoseResponse | Sweep, *, edit: str | None = None) -> go.Figure:
    """Draw what an edit does over its strengths.

    Args:
        result: of `dose_response`: the shift of the forced-choice score with intervals, beside both random controls,
            and perplexity; or of `sweep_edits`: shares of incoherent answers, refusals and changes of language.
        edit: which one of a sweep; by default the incoherent share of all of them.

    Raises:
        InputError: for an edit that the sweep does not have.
    """
    return _doses(result) if isinstance(result, DoseResponse) else _sweep(result, edit)


def _doses(response: DoseResponse) -> go.Figure:
    figure = _figure("shift of the score, nats a token")
    for control, (name, colour, dash) in _CONTROLS.items():
        points = [point for point in response.points if point.control == control]
        means = [point.shift.mean for point in points]
        figure.add_scatter(
            x=[point.strength for point in points],
            y=means,
            name=name,
            mode="lines+markers",
            error_y={
                "array": [point.shift.high - point.shift.mean for point in points],
                "arrayminus": [point.shift.mean - point.shift.low for point in points],
            },
            line={"color": colour, "dash": dash},
            customdata=[point.perplexity for point in points],
            hovertemplate="strength %{x:g}<br>shift %{y:.3f}<br>perplexity %{customdata:.1f}",
        )
    own = [point for point in response.points if point.control == "none"]
    figure.add_scatter(
        x=[point.strength for point in own],
        y=[point.perplexity for point in own],
        name="perplexity of the edit",
        mode="lines",
        yaxis="y2",
        line={"color": _GREY, "width": 1.5},
    )
    figure.add_hline(0, line_color=_GREY, line_width=1)
    figure.update_layout(
        yaxis2={"title": f"perplexity (unedited: {response.perplexity:.1f})", "overlaying": "y", "side": "right"}
        | {"type": "log", "showgrid": False}
    )
    return figure


def _sweep(sweep: Sweep, edit: str | None) -> go.Figure:
    import polars as pl

    if edit is not None and edit not in sweep.edits:
        raise InputError(
            "edit", expected="one of " + ", ".join(sweep.edits), received=repr(edit), remedy="pick one of these"
        )
    figure = _figure("share of answers")
    doses = sweep.doses()
    plain = doses.filter(pl.col("edit") == UNEDITED)
    for name in sweep.edits if edit is None else [edit]:
        own = pl.concat([plain, doses.filter(pl.col("edit") == name)]).sort("strength")
        for column, (word, colour, dash) in list(_SHARES.items())[: 1 if edit is None else None]:
            line: dict[str, Any] = {"dash": dash} if edit is None else {"dash": dash, "color": colour}
            figure.add_scatter(
                x=own["strength"].to_list(),
                y=own[column].to_list(),
                name=name if edit is None else word,
                mode="lines+markers",
                line=line,
            )
        if edit is not None and (most := sweep.max_coherent_strength(name)):
            figure.add_vline(most, line_dash="dash", line_color=_BLUE, annotation_text="largest coherent")
    figure.add_hline(sweep.most_incoherent, line_color=_GREY, line_width=1)
    figure.update_yaxes(range=[-0.02, 1.02])
    return figure


def _figure(y_title: str) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        xaxis_title="strength",
        yaxis_title=y_title,
        legend={"orientation": "h", "y": -0.2},
        margin={"t": 30},
    )
    return figure
