"""Edits for a batch in which every row has edits of its own."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saetools.models.editing import Edits, Stackable, as_sequence
from saetools.models.site import Site
from saetools.models.where import Edit, Where


class PerRow:
    """Another edit for every row of a batch, so that several run side by side; those of one structure run as one.

    Args:
        edits: one per row; `None` leaves a row alone.
    """

    def __init__(self, edits: Sequence[Edit | None]) -> None:
        self._groups: list[tuple[Int[Tensor, " row"], Edit]] = []
        self._n_rows = len(edits)
        rows_of: dict[Hashable, list[int]] = {}
        for row, fn in enumerate(edits):
            if fn is not None:
                rows_of.setdefault(fn.structure() if isinstance(fn, Stackable) else id(fn), []).append(row)
        for rows in rows_of.values():
            different: list[Any] = list({id(edits[row]): edits[row] for row in rows}.values())
            fn = different[0]
            if len(different) > 1:
                numbers = {id(one): number for number, one in enumerate(different)}
                choice = [numbers.get(id(one), 0) for one in edits]
                fn = fn.stacked(different, torch.tensor(choice))
            self._groups.append((torch.tensor(rows), fn))

    def __call__(self, acts: Tensor, where: Where) -> Tensor:
        """Edit each row of a pass by its own edit."""
        out = acts
        for rows, fn in self._groups:
            if len(rows) == self._n_rows:
                return fn(acts, where)
            index = torch.isin(where.rows, rows.to(where.rows.device)).nonzero()[:, 0]
            if len(index):
                out = out.index_copy(0, index, fn(acts[index], where[index]).to(acts.dtype))
        return out


def combine_rows(row_edits: Sequence[Edits | None]) -> dict[Site, list[Edit]]:
    """Edits for a batch in which every row has edits of its own.

    Args:
        row_edits: the edits of each row, `None` for none.
    """
    sites = {site for edits in row_edits if edits is not None for site in edits}
    combined: dict[Site, list[Edit]] = {}
    for site in sorted(sites):
        chains = [as_sequence(edits[site]) if edits is not None and site in edits else () for edits in row_edits]
        combined[site] = [PerRow(stage) for stage in zip_longest(*chains)]
    return combined
