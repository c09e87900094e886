"""Latents as one table, a row each, for spreadsheets and data frames."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from saetools.report.latent_report import LatentReport
from saetools.report.tables import NONE, Cell, Column, Table, interval_cell, token_cell
from saetools.report.wording import number, percent

if TYPE_CHECKING:
    import polars as pl


def latent_row(report: LatentReport) -> dict[str, Any]:
    """What can be said of a latent in single values; names are the columns of `latent_frame`."""
    record, tokens, explanation = report.record, report.tokens, report.explanation
    row: dict[str, Any] = {
        "latent": report.latent,
        "model": record.model,
        "n_active": record.n_active,
        "n_documents": record.n_documents,
        "max": record.max,
    }
    row |= {f"rate_{model}": report.rate(model) for model in report.models}
    row |= {
        "promoted": None if tokens is None else list(tokens.promoted),
        "suppressed": None if tokens is None else list(tokens.suppressed),
        "verdict": None if report.certificate is None else report.certificate["verdict"],
        "explanation": None if explanation is None else explanation.text,
    }
    for name in ("detection", "fuzzing"):
        score = None if explanation is None else getattr(explanation, name)
        row |= {name if end == "mean" else f"{name}_{end}": score and getattr(score, end) for end in _ENDS}
    for change in report.changes:
        role = change["positions"]
        row |= {f"{role}_{name}": value for name, value in change.items() if name not in ("positions", "latent")}
    return row


_ENDS = ("mean", "low", "high")


def latent_frame(rows: Iterable[dict[str, Any]]) -> pl.DataFrame:
    """One row a latent: where it fires, what it promotes, how it changed by role, its verdict and explanation.

    Args:
        rows: of `latent_row`.
    """
    import polars as pl

    return pl.DataFrame(list(rows), infer_schema_length=None)


def flat(frame: pl.DataFrame) -> pl.DataFrame:
    """A frame whose lists are JSON text, which CSV can hold."""
    import polars as pl

    lists = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.List)]

    def text(value: Any) -> str:
        return json.dumps(list(value), ensure_ascii=False)

    return frame.with_columns(pl.col(name).map_elements(text, return_dtype=pl.String) for name in lists)


def index_table(rows: Iterable[dict[str, Any]], caption: str) -> Table:
    """The same as a table to look at: the first role's change only."""
    rows = list(rows)
    models = [name.removeprefix("rate_") for name in rows[0] if name.startswith("rate_")]
    role = next((name.removesuffix("_delta") for name in rows[0] if name.endswith("_delta")), None)
    columns = [Column("latent"), *(Column(f"fires, {model}", "share of all tokens") for model in models), Column("max")]
    if role is not None:
        columns += [Column(f"delta, {role}", "change of mean activation"), Column("q", "false discovery rate")]
    words = [name for name in ("verdict", "explanation") if any(row[name] for row in rows)]
    if any(row["promoted"] for row in rows):
        columns.append(Column("promotes", kind="tokens"))
    columns += [Column(name, kind="text") for name in words]

    def cells(row: dict[str, Any]) -> tuple[Cell, ...]:
        found = [Cell(str(row["latent"]), sort=row["latent"])]
        found += [Cell(percent(row[f"rate_{model}"]), sort=row[f"rate_{model}"]) for model in models]
        found.append(Cell(number(row["max"], 2), sort=row["max"]))
        if role is not None:
            delta, q = row[f"{role}_delta"], row[f"{role}_q_value"]
            found.append(interval_cell(delta, row[f"{role}_low"], row[f"{role}_high"], signed=True))
            found.append(Cell(NONE) if q is None else Cell(f"{q:.2g}", sort=q))
        if any(column.name == "promotes" for column in columns):
            found.append(token_cell((row["promoted"] or [])[:5]))
        return (*found, *(Cell(row[name] or NONE) for name in words))

    return Table(caption, tuple(columns), tuple(map(cells, rows)))
