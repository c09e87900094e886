"""UMAP (arXiv 1802.03426) of decoder rows: it takes minutes, so a process of its own does it, which can be stopped."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saetools.errors import InputError, ResourceError


def _lay_out(rows: Float[np.ndarray, "latent d_model"], path: Path) -> None:
    """Write the places of unit rows to a file, under another name until they are there."""
    from umap import UMAP

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one thread, as the seed asks for
        places = UMAP(metric="cosine", n_neighbors=15, min_dist=0.1, random_state=0).fit_transform(rows)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, places)
    temporary.replace(path)


class Neighbourhoods:
    """The places of decoder rows in the plane, where near ones keep their neighbours; laid out once and kept.

    Args:
        rows: decoder rows.
        path: file that they are kept in.
    """

    def __init__(self, rows: Float[Tensor, "latent d_model"], path: Path) -> None:
        self._rows, self._path, self._lock = rows, path, threading.Lock()
        self._process: Any = None
        self._started = 0.0

    @property
    def seconds(self) -> float | None:
        """For how long they have been laid out; `None` if they are not now."""
        running = self._process is not None and self._process.is_alive()
        return time.monotonic() - self._started if running else None

    def start(self) -> None:
        """Begin, if they are not there and nothing runs.

        Raises:
            InputError: without umap-learn.
        """
        if find_spec("umap") is None:
            raise InputError("map", expected="umap-learn", received="none", remedy="pip install 'saetools[umap]'")
        with self._lock:
            if self._path.exists() or self.seconds is not None:
                return
            unit = torch.nn.functional.normalize(self._rows.float(), dim=1).cpu().numpy()
            self._process = multiprocessing.get_context("spawn").Process(
                target=_lay_out, args=(unit, self._path), daemon=True
            )
            self._started = time.monotonic()
            self._process.start()

    def cancel(self) -> None:
        """Stop; nothing is kept."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.join()
                self._process = None
        for left in self._path.parent.glob(f".{self._path.name}.*.tmp"):
            left.unlink(missing_ok=True)

    def places(self) -> Float[Tensor, "latent 2"] | None:
        """The places, `None` while they are laid out.

        Raises:
            ResourceError: if the process that laid them out died.
        """
        if self._path.exists():
            return torch.from_numpy(np.load(self._path, allow_pickle=False))
        if self._process is not None and self.seconds is None and not self._path.exists():
            code, self._process = self._process.exitcode, None
            raise ResourceError(f"the process that laid out the map ended with code {code}, perhaps for lack of memory")
        return None
