"""The persona report as Markdown: the same words and tables as the page, without its figures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from saetools.report.doses import group_doses
from saetools.report.figures import describe_latents
from saetools.report.tables import (
    INTERVALS,
    SECTIONS,
    WARNINGS,
    Cell,
    Column,
    Table,
    dose_table,
    facts_table,
    fidelity_table,
    latent_table,
    sae_facts,
    score_table,
)
from saetools.report.value import PersonaReport
from saetools.report.wording import visible

_INLINE = re.compile(r"[\\`*_\[\]|~$]|:(?=//)|(?<=www)\.")  # emphasis, code, links, cells, mathematics, bare addresses
_OPENING = re.compile(r"^(\d*)([#+=>-]|(?<=\d)[.)])")  # of headings, lists, quotations, rules


def render_markdown(report: PersonaReport) -> str:
    """The report as GitHub-flavoured Markdown; text of models shows as it is, and as nothing else."""
    return "\n\n".join(_blocks(report)) + "\n"


def _blocks(report: PersonaReport) -> Iterator[str]:
    yield f"# {escape_markdown(report.title)}"
    yield from _section("findings")
    yield "\n".join(f"- {markdown_line(finding)}" for finding in report.findings) or "None recorded."
    if report.warnings:
        yield markdown_line(WARNINGS)
        yield "\n".join(f"- {markdown_line(text)}" for text in report.warnings)
    yield from _section("behaviour")
    yield markdown_line(INTERVALS)
    yield markdown_table(score_table(report))
    yield from _section("latents")
    if report.top_latents:
        yield markdown_line(describe_latents(report))
    yield markdown_table(latent_table(report))
    yield from _section("doses")
    groups = group_doses(report)
    if not groups:
        yield "Not measured."
    for group in groups:
        yield f"### {escape_markdown(group.title)}"
        yield markdown_line(group.summary())
        yield f"Latents: {', '.join(map(str, group.latents))}."
        yield markdown_table(dose_table(group))
    yield from _section("answers")
    if not report.answers:
        yield "None sampled."
    for row in report.answers:
        yield f"### {escape_markdown(row.prompt)}"
        cells = tuple((Cell(variant), Cell(answer)) for variant, answer in row.answers.items())
        yield markdown_table(Table("Answers", (Column("variant", kind="text"), Column("answer", kind="text")), cells))
    yield from _section("sae")
    yield markdown_table(fidelity_table(report))
    yield markdown_table(sae_facts(report))
    yield from _section("provenance")
    yield markdown_table(facts_table("Settings", report.settings))
    provenance = visible(json.dumps(dict(report.provenance), indent=2, ensure_ascii=False))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", provenance)), default=0))
    yield f"{fence}json\n{provenance}\n{fence}"


def _section(anchor: str) -> Iterator[str]:
    section = SECTIONS[anchor]
    yield f"## {section.title}"
    if section.intro:
        yield markdown_line(section.intro)


def markdown_table(table: Table) -> str:
    """A table with its caption and hints."""
    if not table.rows:
        return f"*{escape_markdown(table.caption)}: none.*"
    lines = [
        [escape_markdown(column.name) for column in table.columns],
        [":--" if column.kind != "number" else "--:" for column in table.columns],
        *([_cell(cell) for cell in row] for row in table.rows),
    ]
    blocks = [f"*{escape_markdown(table.caption)}*", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    hints = [f"{column.name}: {column.hint}" for column in table.columns if column.hint]
    return "\n\n".join([*blocks, markdown_line("; ".join(hints))] if hints else blocks)


def _cell(cell: Cell) -> str:
    if cell.tokens:
        return " \u00b7 ".join(map(escape_markdown, cell.tokens))
    return escape_markdown(f"{cell.text} {cell.detail}" if cell.detail else cell.text)


def markdown_line(text: str) -> str:
    """Text as a line of its own, which begins no heading, list or quotation."""
    return _OPENING.sub(r"\1\\\2", escape_markdown(text))


def escape_markdown(text: str) -> str:
    """Text within a line of Markdown: nothing in it formats, links, embeds or ends a cell."""
    text = _INLINE.sub(r"\\\g<0>", visible(text).strip())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", "<br>").replace("\t", " ")
