"""Rows of a table as AG Grid asks for them: sorted and filtered here, so that the browser only holds what it shows.

A request has `startRow`, `endRow`, `sortModel` and `filterModel` (AG Grid's infinite row model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from saetools.errors import InputError

if TYPE_CHECKING:
    import polars as pl

_MOST_ROWS = 1000


def rows_for(frame: pl.DataFrame, request: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """The rows that a grid shows, and how many there are in all.

    Args:
        frame: all rows.
        request: of the grid.

    Raises:
        InputError: for columns that there are not, or filters that are not known.
    """
    found = filtered(frame, request.get("filterModel") or {})
    if sorting := request.get("sortModel") or []:
        names = [_column(frame, one["colId"]) for one in sorting]
        down = [one["sort"] == "desc" for one in sorting]
        found = found.sort(names, descending=down, nulls_last=True, maintain_order=True)
    first = max(0, int(request.get("startRow", 0)))
    last = min(int(request.get("endRow", first)), first + _MOST_ROWS)
    return found[first:last].to_dicts(), len(found)


def filtered(frame: pl.DataFrame, model: Mapping[str, Any]) -> pl.DataFrame:
    """The rows that pass a grid's filters.

    Raises:
        InputError: as `rows_for`.
    """
    import polars as pl

    conditions = [_condition(pl.col(_column(frame, name)), one) for name, one in model.items()]
    return frame.filter(pl.all_horizontal(conditions)) if conditions else frame


def _column(frame: pl.DataFrame, name: str) -> str:
    if name not in frame.columns:
        raise InputError("column", expected="one of the table", received=repr(name), remedy="reload the page")
    return name


def _condition(column: pl.Expr, one: Mapping[str, Any]) -> pl.Expr:
    if "conditions" in one:  # two conditions on a column
        left, *rest = (_condition(column, each) for each in one["conditions"])
        for right in rest:
            left = left & right if one["operator"] == "AND" else left | right
        return left
    kinds = _NUMBERS if one.get("filterType") == "number" else _TEXTS
    if one.get("type") not in kinds:
        raise InputError("filter", expected=", ".join(kinds), received=repr(one.get("type")), remedy="reload the page")
    return kinds[one["type"]](column, one)


def _text(of: Callable[[pl.Expr, str], pl.Expr]) -> Callable[[pl.Expr, Mapping[str, Any]], pl.Expr]:
    """A condition on a text, in which case does not count."""

    def condition(column: pl.Expr, one: Mapping[str, Any]) -> pl.Expr:
        return of(column.fill_null("").str.to_lowercase(), str(one["filter"]).lower())

    return condition


_TEXTS: dict[str, Callable[[pl.Expr, Mapping[str, Any]], pl.Expr]] = {
    "contains": _text(lambda column, text: column.str.contains(text, literal=True)),
    "notContains": _text(lambda column, text: ~column.str.contains(text, literal=True)),
    "equals": _text(lambda column, text: column == text),
    "notEqual": _text(lambda column, text: column != text),
    "startsWith": _text(lambda column, text: column.str.starts_with(text)),
    "endsWith": _text(lambda column, text: column.str.ends_with(text)),
    "blank": lambda column, _: column.fill_null("") == "",
    "notBlank": lambda column, _: column.fill_null("") != "",
}
_NUMBERS: dict[str, Callable[[pl.Expr, Mapping[str, Any]], pl.Expr]] = {
    "equals": lambda column, one: column == float(one["filter"]),
    "notEqual": lambda column, one: column != float(one["filter"]),
    "lessThan": lambda column, one: column < float(one["filter"]),
    "lessThanOrEqual": lambda column, one: column <= float(one["filter"]),
    "greaterThan": lambda column, one: column > float(one["filter"]),
    "greaterThanOrEqual": lambda column, one: column >= float(one["filter"]),
    "inRange": lambda column, one: column.is_between(float(one["filter"]), float(one["filterTo"])),
    "blank": lambda column, _: column.is_null(),
    "notBlank": lambda column, _: column.is_not_null(),
}
