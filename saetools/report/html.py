"""The persona report as one HTML file that opens from disk: plotly inline, nothing fetched, text of models escaped."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from saetools.report.doses import group_doses
from saetools.report.figures import (
    describe_latents,
    describe_scores,
    latent_figure,
    perplexity_figure,
    score_figure,
    strength_figure,
)
from saetools.report.pages import asset, environment, policy_hash
from saetools.report.tables import (
    INTERVALS,
    SECTIONS,
    WARNINGS,
    dose_table,
    facts_table,
    fidelity_table,
    latent_table,
    sae_facts,
    score_table,
)
from saetools.report.value import PersonaReport

if TYPE_CHECKING:
    import plotly.graph_objects as go


def render_html(report: PersonaReport) -> str:
    """The report as a self-contained page.

    A content security policy lets only the page's own two scripts run and nothing load, should escaping ever fail.

    Example:
        >>> page = render_html(PersonaReport.from_json("data/demo/report.json"))
        >>> page[:15]
        '<!doctype html>'
    """
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    style, script = map(asset, ("page.css", "page.js"))
    plotly = get_plotlyjs().replace("\r\n", "\n")
    return str(
        environment()
        .get_template("template.html.jinja")
        .render(
            report=report,
            sections=SECTIONS,
            intervals=INTERVALS,
            warnings=WARNINGS,
            scores=score_table(report),
            scores_figure=_figure_json(score_figure(report)) if report.scores else None,
            scores_summary=describe_scores(report.scores),
            latents=latent_table(report),
            latents_figure=_figure_json(latent_figure(report)) if report.top_latents else None,
            latents_summary=describe_latents(report) if report.top_latents else "",
            doses=[
                {
                    "title": group.title,
                    "summary": group.summary(),
                    "latents": ", ".join(map(str, group.latents)),
                    "table": dose_table(group),
                    "by_strength": _figure_json(strength_figure(group)),
                    "by_perplexity": _figure_json(perplexity_figure(group)),
                }
                for group in group_doses(report)
            ],
            fidelity=fidelity_table(report),
            sae_facts=sae_facts(report),
            settings=facts_table("Settings", report.settings),
            provenance=json.dumps(dict(report.provenance), indent=2, ensure_ascii=False),
            style=Markup(style),
            scripts=[Markup(plotly), Markup(script)],
            script_hashes=[policy_hash(plotly), policy_hash(script)],
        )
    )


def _figure_json(figure: go.Figure) -> Any:
    """A figure as JSON that cannot end the script element it stands in."""
    from markupsafe import Markup

    text = figure.to_json(engine="json")
    return Markup(re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text))
