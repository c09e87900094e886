"""Writing a report into a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from saetools.errors import InputError
from saetools.report.html import render_html
from saetools.report.markdown import render_markdown
from saetools.report.value import PersonaReport

_RENDERERS: Mapping[str, tuple[str, Callable[[PersonaReport], str]]] = {
    "html": ("report.html", render_html),
    "json": ("report.json", PersonaReport.to_json),
    "markdown": ("report.md", render_markdown),
}


def write_report(
    report: PersonaReport, out: Path, *, formats: Sequence[str] = ("html", "json", "markdown")
) -> dict[str, Path]:
    """Write `report.html`, `report.json` and `report.md`; old files stay whole until all new ones are.

    Args:
        report: what to write.
        out: folder, made if missing.
        formats: which of `html`, `json`, `markdown`.

    Returns:
        The files by format.

    Raises:
        InputError: for an unknown format, or if `out` is a file.
    """
    unknown = [name for name in formats if name not in _RENDERERS]
    if unknown or not formats:
        raise InputError(
            "formats", expected=f"some of {', '.join(_RENDERERS)}", received=unknown or "none", remedy="name these only"
        )
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError("out", expected="a folder", received=f"the file {out}", remedy="pass a folder")
    texts = {name: _RENDERERS[name][1](report) for name in formats}
    out.mkdir(parents=True, exist_ok=True)
    paths = {name: out / _RENDERERS[name][0] for name in texts}
    temporary = {name: path.with_name(f".{path.name}.{os.getpid()}.tmp") for name, path in paths.items()}
    try:
        for name, text in texts.items():
            temporary[name].write_text(text, encoding="utf-8", newline="\n")
        for name, path in paths.items():
            temporary[name].replace(path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return paths
