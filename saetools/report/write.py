"""Writing a report into a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from saetools.errors import InputError
from saetools.report.html import render_html
from saetools.report.latent_frame import flat
from saetools.report.markdown import render_markdown
from saetools.report.run_frame import run_frames
from saetools.report.value import PersonaReport

_TEXTS: Mapping[str, tuple[str, Callable[[PersonaReport], str]]] = {
    "html": ("report.html", render_html),
    "json": ("report.json", PersonaReport.to_json),
    "markdown": ("report.md", render_markdown),
}
_TABLES = ("parquet", "csv")
_FORMATS = (*_TEXTS, *_TABLES)


def write_report(
    report: PersonaReport, out: Path, *, formats: Sequence[str] = ("html", "json", "markdown")
) -> dict[str, Path]:
    """Write `report.html`, `report.json` and `report.md`; old files stay whole until all new ones are.

    The tables of `run_frames` go to `report-scores.csv` and so on.

    Args:
        report: what to write.
        out: folder, made if missing.
        formats: which of `html`, `json`, `markdown`, `parquet`, `csv`.

    Returns:
        The files by format, those of tables by their names, such as `scores.csv`.

    Raises:
        InputError: for an unknown format, or if `out` is a file.
    """
    unknown = [name for name in formats if name not in _FORMATS]
    if unknown or not formats:
        expected = f"some of {', '.join(_FORMATS)}"
        raise InputError("formats", expected=expected, received=unknown or "none", remedy="name these only")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError("out", expected="a folder", received=f"the file {out}", remedy="pass a folder")
    texts = {name: _TEXTS[name][1](report) for name in formats if name in _TEXTS}
    paths = {name: out / _TEXTS[name][0] for name in texts}
    kinds = [kind for kind in formats if kind in _TABLES]
    figures = run_frames(report) if kinds else {}
    frames = {f"{name}.{kind}": frame for kind in kinds for name, frame in figures.items()}
    paths |= {name: out / f"report-{name}" for name in frames}
    out.mkdir(parents=True, exist_ok=True)
    temporary = {name: path.with_name(f".{path.name}.{os.getpid()}.tmp") for name, path in paths.items()}
    try:
        for name, text in texts.items():
            temporary[name].write_text(text, encoding="utf-8", newline="\n")
        for name, frame in frames.items():
            if name.endswith(".csv"):
                flat(frame).write_csv(temporary[name])
            else:
                frame.write_parquet(temporary[name])
        for name, path in paths.items():
            temporary[name].replace(path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return paths
