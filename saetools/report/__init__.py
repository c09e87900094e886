"""Reports: a persona report, and all that is known of latents, each one value in several formats."""

from saetools.report.collect import report_latents
from saetools.report.html import render_html
from saetools.report.latent_report import LatentReport, read_latent_reports
from saetools.report.latent_write import write_latent_reports
from saetools.report.markdown import render_markdown
from saetools.report.neuronpedia import NeuronpediaNames
from saetools.report.value import AnswerRow, DoseRow, LatentRow, ModelScore, PersonaReport
from saetools.report.write import write_report

__all__ = [
    "AnswerRow",
    "DoseRow",
    "LatentReport",
    "LatentRow",
    "ModelScore",
    "NeuronpediaNames",
    "PersonaReport",
    "read_latent_reports",
    "render_html",
    "render_markdown",
    "report_latents",
    "write_latent_reports",
    "write_report",
]
