"""Latents as HTML pages that open from disk: no script but a table sorter, nothing fetched, text of models escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from saetools.histogram import Histogram
from saetools.latents.passage import Passage
from saetools.report.latent_report import LatentReport
from saetools.report.latent_tables import context_tables, explained, headline, main_tables
from saetools.report.pages import asset, environment, policy_hash
from saetools.report.tables import Table
from saetools.report.wording import number, visible

if TYPE_CHECKING:
    from markupsafe import Markup

_LEVELS = 9  # of colour
_WIDTH, _HEIGHT = 320, 72  # of a histogram
_SERIES = 3  # colours in the style sheet


def render_latents(
    reports: Sequence[LatentReport], *, title: str, places: Mapping[str, str], index: str | None = None
) -> str:
    """Some latents as one page.

    Args:
        reports: the latents, in this order.
        title: headline.
        places: links from this page to the latents of the whole report, by their numbers.
        index: link to the table of all latents, if there is one.
    """
    return _page("latents.html.jinja", title=title, index=index, latents=list(map(_shown, reports)), places=places)


def render_index(table: Table, *, title: str, places: Mapping[str, str], intro: str) -> str:
    """The table of all latents as a page, each a link to where it is.

    Args:
        table: one row a latent; the first cell is its number.
        title: headline.
        places: links from this page to the latents, by their numbers.
        intro: a sentence under the headline.
    """
    return _page("latent_index.html.jinja", title=title, intro=intro, table=table, links=places)


def _page(template: str, **values: Any) -> str:
    """A page in the style of all, with the one script that its policy lets run."""
    from markupsafe import Markup

    script = asset("page.js")
    style = Markup(asset("page.css") + asset("latents.css"))
    page = environment().get_template(template)
    return str(page.render(style=style, script=Markup(script), script_hash=policy_hash(script), **values))


def _shown(report: LatentReport) -> dict[str, Any]:
    record = report.record
    most = strongest(report)
    histograms = {model: one for model, one in report.histograms.items() if sum(one.counts)}
    return {
        "latent": report.latent,
        "headline": headline(report),
        "explanation": explained(report),
        "models": report.models,
        "histograms": _histograms(histograms) if histograms else None,
        "histograms_label": "How large its activations are where it is active, by model: " + "; ".join(histograms),
        "tables": main_tables(report),
        "more": context_tables(report),
        "top": [_passage(one, report.models, most) for one in record.top],
        "bins": [
            {
                "title": f"{100 * one.low:.0f} to {100 * one.high:.0f} % of its active tokens, from weak to strong",
                "passages": [_passage(passage, report.models, most) for passage in one.passages],
            }
            for one in reversed(record.bins)
        ],
    }


def _passage(passage: Passage, models: Sequence[str], most: float) -> dict[str, Any]:
    return {
        "where": f"{passage.dataset}, {passage.document_id or passage.document}, from token {passage.start}",
        "texts": [_marked(passage, model, most) for model in models],
    }


def _marked(passage: Passage, model: str, most: float) -> Markup:
    """The passage, each active token shaded by its activation, which shows when the pointer rests on it."""
    from markupsafe import Markup

    parts: list[str] = []
    for token, act, level in shaded(passage, model, most):
        text = _escaped(token)
        peak = " peak" if len(parts) == passage.peak else ""
        parts.append(f'<mark class="a{level}{peak}" title="{number(act, 2)}">{text}</mark>' if level else text)
    return Markup("".join(parts))


def shaded(passage: Passage, model: str, most: float) -> Iterator[tuple[str, float, int]]:
    """Each token with its activation and a level of colour from 1 to 9, or 0 where the latent is not active.

    Args:
        passage: the tokens.
        model: by whose activations.
        most: the activation that gets the strongest colour.
    """
    for token, act in zip(passage.tokens, passage.acts[model], strict=True):
        yield token, act, level_of(act, most)


def level_of(act: float, most: float) -> int:
    """The level of colour of an activation, from 1 to 9; 0 for none."""
    return max(1, min(_LEVELS, round(_LEVELS * abs(act) / most))) if act and most else 0


def strongest(report: LatentReport) -> float:
    """The largest activation in a latent's passages: it gets the strongest colour."""
    return max(
        [report.record.max, *(max(acts, default=0.0) for one in report.record.top for acts in one.acts.values())]
    )


@lru_cache(maxsize=65536)
def _escaped(token: str) -> str:
    from markupsafe import escape

    return str(escape(visible(token.replace("\r", ""))))  # line breaks of two characters are often two tokens


def _histograms(histograms: dict[str, Histogram]) -> Markup:
    """Histograms in the same bins as one drawing; heights are shares of a model's active tokens."""
    from markupsafe import Markup

    edges = next(iter(histograms.values())).edges
    shares = [[count / sum(one.counts) for count in one.counts] for one in histograms.values()]
    highest = max(map(max, shares)) or 1.0
    step = _WIDTH / len(shares[0])
    lines = []
    for series, heights in enumerate(shares):
        tops = [f"{_HEIGHT * (1 - height / highest):.1f}" for height in heights]
        path = f"M0 {_HEIGHT}" + "".join(f"V{top}h{step:g}" for top in tops) + f"V{_HEIGHT}Z"
        lines.append(f'<path class="s{series % _SERIES}" d="{path}"/>')
    ticks = "".join(
        f'<text x="{place}" y="{_HEIGHT + 14}" text-anchor="{anchor}">{number(value, 2)}</text>'
        for place, anchor, value in ((0, "start", edges[0]), (_WIDTH, "end", edges[-1]))
    )
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT + 18}"'
    axis = f'<line x1="0" y1="{_HEIGHT}" x2="{_WIDTH}" y2="{_HEIGHT}"/>'
    return Markup(f'<svg {box} class="histogram" aria-hidden="true">{"".join(lines)}{axis}{ticks}</svg>')
