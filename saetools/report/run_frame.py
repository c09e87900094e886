"""The figures of a run as tables, for spreadsheets and data frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from saetools.report.value import PersonaReport
from saetools.stats import Estimate

if TYPE_CHECKING:
    import polars as pl


def run_frames(report: PersonaReport) -> dict[str, pl.DataFrame]:
    """The scores, latents and doses of a run; an estimate is one column for each of its parts, such as `shift_low`.

    Args:
        report: of the run.
    """
    return {
        "scores": _frame(report.scores),
        "latents": _frame(report.top_latents),
        "doses": _frame(report.dose_response),
    }


def _frame(rows: Sequence[Any]) -> pl.DataFrame:
    import polars as pl

    return pl.DataFrame([_row(row) for row in rows], infer_schema_length=None)


def _row(row: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if "Estimate" in str(field.type):
            parts = [part.name for part in dataclasses.fields(Estimate)]
            flat |= {f"{field.name}_{part}": None if value is None else getattr(value, part) for part in parts}
        else:
            flat[field.name] = list(value) if isinstance(value, tuple) else value
    return flat
