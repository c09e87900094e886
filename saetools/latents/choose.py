"""Which tokens passages are shown around: strong ones of different documents, and random ones that do not overlap."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from jaxtyping import UInt32

from saetools.latents.corpus import CorpusArrays

_TOP_PAIRS = 1 << 16  # strongest activations among which documents are looked for
_TRIES = 8  # random tokens drawn for each one wanted, since passages around some overlap with others


def window(corpus: CorpusArrays, row: int, context: int) -> tuple[int, int]:
    """First and last + 1 of the rows around a row, within its document."""
    document = corpus.document_of(row)
    first, last = corpus.document_starts[document], corpus.document_starts[document + 1]
    return max(int(first), row - context), min(int(last), row + context + 1)


def first_of_documents(corpus: CorpusArrays, rows: UInt32[np.ndarray, " pair"], n: int, n_documents: int) -> list[int]:
    """The first row in each of the first n documents; looks no further than it has to, and not beyond 65,536 rows.

    Args:
        corpus: the corpus.
        rows: best first.
        n: wanted.
        n_documents: documents in which there are rows.
    """
    wanted, size = min(n, n_documents), 8 * n
    while wanted:
        some = np.asarray(rows[: min(size, _TOP_PAIRS)])
        _, first = np.unique(corpus.documents_of(some), return_index=True)
        if len(first) >= wanted or size >= min(len(rows), _TOP_PAIRS):
            return [int(row) for row in some[np.sort(first)[:wanted]]]
        size *= 8
    return []


class Taken:
    """The rows that chosen passages cover.

    Args:
        corpus: the corpus.
        context: rows of a passage before and after the one it is chosen by.
    """

    def __init__(self, corpus: CorpusArrays, context: int) -> None:
        self._corpus, self._context = corpus, context
        self._windows: dict[int, list[tuple[int, int]]] = {}

    def add(self, rows: Iterable[int]) -> None:
        """Cover the passages around rows."""
        for row in rows:
            covered = self._windows.setdefault(self._corpus.document_of(row), [])
            covered.append(window(self._corpus, row, self._context))

    def choose(self, rows: Iterable[int], n: int) -> list[int]:
        """The first n rows, each of another document, whose passages cover nothing that is covered; covers them."""
        chosen: list[int] = []
        seen: set[int] = set()
        for row in rows:
            if len(chosen) == n:
                break
            document = self._corpus.document_of(row)
            first, last = window(self._corpus, row, self._context)
            free = all(last <= start or end <= first for start, end in self._windows.get(document, ()))
            if free and document not in seen:
                seen.add(document)
                chosen.append(row)
                self.add([row])
        return chosen

    def choose_bins(
        self, rows: UInt32[np.ndarray, " pair"], n_bins: int, n: int, generator: torch.Generator
    ) -> Iterator[tuple[float, float, list[int]]]:
        """Random rows from equal parts, of weak to strong ones: where the part starts and ends, and up to n rows.

        Args:
            rows: the strongest first.
            n_bins: parts.
            n: rows of each.
            generator: of the choice.
        """
        for part in range(n_bins):
            low, high = part * len(rows) // n_bins, (part + 1) * len(rows) // n_bins
            drawn = torch.randint(low, max(high, low + 1), (n * _TRIES if high > low else 0,), generator=generator)
            chosen = self.choose(rows[len(rows) - 1 - drawn.numpy()].tolist(), n)
            yield part / n_bins, (part + 1) / n_bins, chosen
