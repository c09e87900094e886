"""What a user calls latents, kept in a file of the run."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from saetools.errors import InputError, IntegrityError
from saetools.provenance import write_json

_MOST_LETTERS = 10_000


@dataclass(frozen=True)
class Label:
    """A user's words for a latent.

    Args:
        label: a short name.
        note: anything longer.
    """

    label: str = ""
    note: str = ""


class Labels:
    """The labels of a run; every change is on disk when `set` returns.

    Several tabs may write at a time; the last one to change a latent wins, and none changes others.

    Args:
        path: the JSON file; made with the first label.

    Raises:
        IntegrityError: if the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._labels: dict[int, Label] = {}
        if path.is_file():
            try:
                raw = json.loads(path.read_text(encoding="utf-8"))
                self._labels = {int(latent): Label(**value) for latent, value in raw["labels"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise IntegrityError(f"{path} holds no labels ({error!r}); mend it, or move it away") from error

    def of(self, latent: int) -> Label:
        """The label of a latent; empty if it has none."""
        return self._labels.get(latent, Label())

    def all(self) -> dict[int, Label]:
        """The latents that have one."""
        return dict(self._labels)

    def set(self, latent: int, label: Label) -> None:
        """Give a latent a label; an empty one takes it away.

        Raises:
            InputError: for more than 10,000 letters.
        """
        for name, text in asdict(label).items():
            if len(text) > _MOST_LETTERS:
                raise InputError(
                    name, expected=f"at most {_MOST_LETTERS:,} letters", received=f"{len(text):,}", remedy="shorten it"
                )
        with self._lock:
            labels = {**self._labels, latent: label}
            if label == Label():
                del labels[latent]
            write_json(self._path, {"labels": {str(one): asdict(labels[one]) for one in sorted(labels)}})
            self._labels = labels
