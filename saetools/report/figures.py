"""The report's figures; the page gives them their font and the colours of its light or dark scheme.

Colours are near Okabe and Ito's palette: colour-blind readers tell them apart, and all contrast 3 to 1 on both grounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import TYPE_CHECKING, Any

from saetools.report.doses import CONTROLS, DoseGroup
from saetools.report.value import DoseRow, ModelScore, PersonaReport
from saetools.report.wording import estimate, mean_and_interval, number, token, visible

if TYPE_CHECKING:
    import plotly.graph_objects as go

_GREY, _BLUE, _VERMILION, _PURPLE, _TEAL = "#7d8590", "#2680c2", "#d55e00", "#9168d6", "#168f7a"
_STYLES: Mapping[str, tuple[str, str, str]] = {  # colour, marker, line
    "none": (_VERMILION, "circle", "solid"),
    "equal_norm": (_TEAL, "square", "dot"),
    "equal_perplexity": (_PURPLE, "diamond", "dash"),
}
_SCORE = "forced-choice score"


def score_figure(report: PersonaReport) -> go.Figure:
    """Forced-choice score of every model, with intervals."""
    figure = _figure(height=90 + 42 * len(report.scores), x_title="score (higher = more misaligned)")
    for row in report.scores:
        colour = _GREY if row.model == "base" else _BLUE if "twin" in row.model else _VERMILION
        figure.add_scatter(
            x=[row.score.mean],
            y=[_label(row.model)],
            error_x=_bars([row.score.mean], [row.score.low], [row.score.high]),
            marker={"size": 11, "color": colour},
            hovertext=_label(f"{row.model}: {estimate(row.score)}, n = {row.score.n}"),
        )
    figure.update_layout(showlegend=False)
    figure.update_yaxes(type="category", range=[len(report.scores) - 0.5, -0.5], showgrid=False)
    return figure


def describe_scores(scores: Sequence[ModelScore]) -> str:
    """The score figure in words."""
    return "; ".join(f"{row.model} {estimate(row.score)}" for row in scores) + "."


def latent_figure(report: PersonaReport) -> go.Figure:
    """Change of every top latent with its interval, beside the benign twin's.

    `layout.meta.named` holds labels with tokens for pages that are wide enough.
    """
    rows = report.top_latents
    names = [str(row.latent) for row in rows]
    figure = _figure(height=120 + 24 * len(rows), x_title="change of mean activation by latent, tuned \u2212 base")
    twins = [row for row in rows if row.delta_twin is not None]
    if twins:
        figure.add_scatter(
            x=[row.delta_twin for row in twins],
            y=[str(row.latent) for row in twins],
            name="benign twin",
            marker={"size": 9, "color": _BLUE, "symbol": "diamond-open", "line": {"width": 2}},
            hovertext=[f"latent {row.latent}, twin: {number(row.delta_twin or 0, signed=True)}" for row in twins],
        )
    figure.add_scatter(
        x=[row.delta for row in rows],
        y=names,
        name="fine-tune",
        error_x=_bars([row.delta for row in rows], [row.low for row in rows], [row.high for row in rows]),
        marker={"size": 9, "color": _VERMILION},
        hovertext=[
            f"latent {row.latent}: {mean_and_interval(row.delta, row.low, row.high, signed=True)}<br>promotes "
            + _tokens(row.promoted[:6])
            for row in rows
        ],
    )
    figure.update_yaxes(type="category", range=[len(rows) - 0.5, -0.5])
    figure.update_yaxes(categoryorder="array", categoryarray=names, tickvals=names, ticktext=names)
    figure.update_layout(meta={"named": [f"{_tokens(row.promoted[:3])}  <b>{row.latent}</b>" for row in rows]})
    return figure


def describe_latents(report: PersonaReport) -> str:
    """The latent figure in words."""
    rows = report.top_latents
    first = max(rows, key=lambda row: row.delta)
    above = sum(row.low is not None and row.low > 0 for row in rows)
    sentences = [
        f"{above} of {len(rows)} intervals lie above zero. Largest: latent {first.latent}, "
        f"{mean_and_interval(first.delta, first.low, first.high, signed=True)}."
    ]
    twins = [row.delta_twin for row in rows if row.delta_twin is not None]
    if twins:
        mean = fmean(row.delta for row in rows)
        sentences.append(
            f"On average these latents change by {number(mean, signed=True)} in the fine-tune and by "
            f"{number(fmean(twins), signed=True)} in the benign twin."
        )
    return " ".join(sentences)


def strength_figure(group: DoseGroup) -> go.Figure:
    """Score against strength, for the edit and both controls; series stand a little apart so that bars stay apart."""
    figure = _figure(height=360, x_title="strength", y_title=_SCORE)
    strengths = [row.strength for row in group.rows]
    step = 0.008 * (max(strengths) - min(strengths))
    for shift, control in enumerate(CONTROLS, start=-1):
        rows = group.series(control)
        _add_doses(figure, rows, [row.strength + shift * step for row in rows], group)
    _add_unedited(figure, [min(strengths), max(strengths)], group, mode="lines")
    return figure


def perplexity_figure(group: DoseGroup) -> go.Figure:
    """Score against perplexity: what behaviour each series buys for how much damage."""
    figure = _figure(height=360, x_title="perplexity", y_title=_SCORE)
    for control in CONTROLS:
        rows = group.series(control)
        _add_doses(figure, rows, [row.perplexity for row in rows], group)
    if group.perplexity is not None:
        _add_unedited(figure, [group.perplexity], group, mode="markers")
    known = [x for x in (*(row.perplexity for row in group.rows), group.perplexity) if x and math.isfinite(x)]
    if known and max(known) > 3 * min(known):
        low, high = math.log10(min(known)), math.log10(max(known))
        ticks = [m * 10**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
        pad = 0.06 * (high - low)
        figure.update_xaxes(
            type="log", range=[low - pad, high + pad], tickvals=ticks, ticktext=[f"{x:,g}" for x in ticks]
        )
    return figure


def _add_doses(figure: go.Figure, rows: Sequence[DoseRow], x: Sequence[float], group: DoseGroup) -> None:
    if not rows:
        return
    colour, symbol, dash = _STYLES[rows[0].control]
    name = group.edit if rows[0].control == "none" else CONTROLS[rows[0].control].removeprefix("random, ")
    figure.add_scatter(
        x=x,
        y=[row.score.mean for row in rows],
        name=_label(name),
        mode="lines+markers",
        error_y=_bars(*([getattr(row.score, end) for row in rows] for end in ("mean", "low", "high"))),
        line={"color": colour, "dash": dash, "width": 2},
        marker={"color": colour, "symbol": symbol, "size": 8},
        hovertext=[
            _label(f"{name}, strength {row.strength:g}")
            + f"<br>score {estimate(row.score)}<br>perplexity {number(row.perplexity, 2)}"
            for row in rows
        ],
    )


def _add_unedited(figure: go.Figure, x: Sequence[float], group: DoseGroup, *, mode: str) -> None:
    figure.add_scatter(
        x=x,
        y=[group.unedited] * len(x),
        name="unedited",
        mode=mode,
        line={"color": _GREY, "width": 1.5},
        marker={"color": _GREY, "symbol": "x", "size": 9},
        hovertext=_label(f"unedited {group.model}") + f"<br>score {number(group.unedited)}",
    )


def _figure(*, height: int, x_title: str, y_title: str = "") -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        hovermode="closest",
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
    )
    figure.update_xaxes(title={"text": x_title, "standoff": 10}, automargin=True)
    figure.update_yaxes(title={"text": y_title, "standoff": 8}, automargin=True)
    return figure


def _bars(means: Sequence[float], lows: Sequence[float | None], highs: Sequence[float | None]) -> dict[str, Any]:
    """Error bars; none where an end of the interval is not known."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [None if high is None else high - mean for mean, high in zip(means, highs, strict=True)],
        "arrayminus": [None if low is None else mean - low for mean, low in zip(means, lows, strict=True)],
        "thickness": 1.75,
        "width": 0,
    }


def _tokens(tokens: Sequence[str]) -> str:
    return ", ".join(escape(token(text)[:20]) for text in tokens)


def _label(text: str) -> str:
    """Text that plotly, which reads tags in labels, shows as it is."""
    return escape(visible(text)[:80])
