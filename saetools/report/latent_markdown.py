"""Latents as Markdown: the same words and tables as the pages; where they fire is in bold."""

from __future__ import annotations

from itertools import groupby

from saetools.latents.passage import Passage
from saetools.report.latent_report import LatentReport
from saetools.report.latent_tables import context_tables, explained, headline, main_tables
from saetools.report.markdown import escape_markdown, markdown_line, markdown_table


def render_latent(report: LatentReport) -> str:
    """One latent as GitHub-flavoured Markdown; text of models shows as it is, and as nothing else."""
    blocks = [f"## Latent {report.latent}", markdown_line(headline(report))]
    if text := explained(report):
        blocks.append(markdown_line(text))
    blocks += map(markdown_table, [*main_tables(report), *context_tables(report)])
    if report.record.top:
        blocks.append(f"Largest activations in {escape_markdown(report.record.model)}, active tokens in bold:")
        lines = [f"{number}. {_marked(one, report.record.model)}" for number, one in enumerate(report.record.top, 1)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n\n"


def _marked(passage: Passage, model: str) -> str:
    parts = []
    pairs = zip(passage.tokens, passage.acts[model], strict=True)
    for is_active, some in groupby(pairs, key=lambda pair: pair[1] != 0):
        text = "".join(token for token, _ in some)
        middle = escape_markdown(text)
        left, right = (" " if part else "" for part in (text[:1].isspace(), text[-1:].isspace()))
        parts.append(f"{left}<b>{middle}</b>{right}" if is_active and middle else f"{left}{middle}{right}")
    return "".join(parts).strip()
