"""Writing latents into a folder: pages, Markdown, JSON, tables, and what Neuronpedia takes."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from saetools.errors import InputError
from saetools.report.latent_frame import flat, index_table, latent_frame, latent_row
from saetools.report.latent_html import render_index, render_latents
from saetools.report.latent_markdown import render_latent
from saetools.report.latent_report import LatentReport, json_line
from saetools.report.markdown import escape_markdown
from saetools.report.neuronpedia import NeuronpediaNames, neuronpedia_batch
from saetools.room import enough_room

LatentFormat = Literal["html", "markdown", "json", "parquet", "csv", "neuronpedia"]
LATENT_FORMATS: tuple[LatentFormat, ...] = get_args(LatentFormat)
_PER_PAGE = 20  # latents of an HTML page, and of a batch for Neuronpedia


def write_latent_reports(
    reports: Iterable[LatentReport],
    latents: Sequence[int],
    out: str | Path,
    *,
    formats: Sequence[str] = ("html", "markdown", "json", "parquet", "csv"),
    title: str = "Latents",
    neuronpedia: NeuronpediaNames | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Path]:
    """Write latents into a new folder; it is there when it is whole.

    `html`: `index.html`, and pages of 20 latents, `latents-001.html` and so on. `markdown`: `latents.md`. `json`:
    `latents.jsonl`, a line each, which `read_latent_reports` reads. `parquet`, `csv`: one row a latent. `neuronpedia`:
    `neuronpedia/batch-0.json` and so on. Only a page's worth of latents is in memory.

    Args:
        reports: the latents; `report_latents` gives them.
        latents: which will come, in their order: pages link to those on other pages.
        out: folder, new or empty.
        formats: which.
        title: headline.
        neuronpedia: names for that format, which needs them.
        on_progress: called with latents done and in all.

    Returns:
        The first file of each format.

    Raises:
        InputError: for an unknown format, a folder that is not empty, or no names for Neuronpedia.
        ResourceError: if the disk is full; nothing is left behind.
    """
    out = Path(out)
    unknown = [name for name in formats if name not in LATENT_FORMATS]
    if unknown or not formats:
        expected = f"some of {', '.join(LATENT_FORMATS)}"
        raise InputError("formats", expected=expected, received=unknown or "none", remedy="name these only")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            "out", expected="a new or empty folder", received=str(out), remedy="choose another, or remove it"
        )
    if "neuronpedia" in formats and neuronpedia is None:
        raise InputError("neuronpedia", expected="names of model and source", received="none", remedy="pass them")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with enough_room(f"a report in {out}"):
            first = _write(reports, latents, folder, formats, title, neuronpedia, on_progress)
            folder.chmod(0o755)
            folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {name: out / file for name, file in first.items()}


def _write(
    reports: Iterable[LatentReport],
    latents: Sequence[int],
    folder: Path,
    formats: Sequence[str],
    title: str,
    names: NeuronpediaNames | None,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, str]:
    pages = {latent: f"latents-{1 + place // _PER_PAGE:03}.html" for place, latent in enumerate(latents)}
    links = {str(latent): f"{page}#latent-{latent}" for latent, page in pages.items()}
    rows: list[dict[str, Any]] = []
    rest = iter(reports)
    with ExitStack() as stack:

        def opened(file: str) -> Any:
            return stack.enter_context((folder / file).open("w", encoding="utf-8", newline="\n"))

        lines = opened("latents.jsonl") if "json" in formats else None
        markdown = opened("latents.md") if "markdown" in formats else None
        if markdown is not None:
            markdown.write(f"# {escape_markdown(title)}\n\n")
        while some := list(islice(rest, _PER_PAGE)):
            number = len(rows) // _PER_PAGE
            rows += map(latent_row, some)
            if lines is not None:
                lines.writelines(map(json_line, some))
            if markdown is not None:
                markdown.writelines(map(render_latent, some))
            if "html" in formats:
                page = render_latents(some, title=title, places=links, index="index.html")
                (folder / f"latents-{1 + number:03}.html").write_text(page, encoding="utf-8", newline="\n")
            if names is not None and "neuronpedia" in formats:
                (folder / "neuronpedia").mkdir(exist_ok=True)
                text = json.dumps(neuronpedia_batch(some, names))
                (folder / "neuronpedia" / f"batch-{number}.json").write_text(text, encoding="utf-8")
            if on_progress is not None:
                on_progress(len(rows), len(latents))
    if [row["latent"] for row in rows] != list(latents):
        raise InputError(
            "latents", expected="those of the reports, in their order", received="others", remedy="pass the same"
        )
    if "html" in formats:
        intro = f"{len(rows):,} latents. Click a number to see where it fires; click a header to sort."
        page = render_index(index_table(rows, "Latents"), title=title, places=links, intro=intro)
        (folder / "index.html").write_text(page, encoding="utf-8", newline="\n")
    frame = latent_frame(rows) if {"parquet", "csv"} & set(formats) else None
    if frame is not None and "parquet" in formats:
        frame.write_parquet(folder / "latents.parquet")
    if frame is not None and "csv" in formats:
        flat(frame).write_csv(folder / "latents.csv")
    files = {"html": "index.html", "markdown": "latents.md", "json": "latents.jsonl"}
    files |= {"parquet": "latents.parquet", "csv": "latents.csv", "neuronpedia": "neuronpedia/batch-0.json"}
    return {name: files[name] for name in formats}
