"""The persona report: one value, as HTML, JSON and Markdown."""

from saetools.report.html import render_html
from saetools.report.markdown import render_markdown
from saetools.report.value import AnswerRow, DoseRow, LatentRow, ModelScore, PersonaReport
from saetools.report.write import write_report

__all__ = [
    "AnswerRow",
    "DoseRow",
    "LatentRow",
    "ModelScore",
    "PersonaReport",
    "render_html",
    "render_markdown",
    "write_report",
]
