"""What every library does: read a corpus with the model, and write pages and Neuronpedia's batches of some latents.

An item is a whole run, from the loaded model and SAE to files on disk. The first one has few tokens and few latents, so
that nobody's first use of anything is timed.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

PER_PAGE = 20
N_TOP, N_BINS, N_PER_BIN, CONTEXT, N_TOKENS = 20, 4, 5, 24, 10
"""Of a latent: 20 passages around its largest activations and 5 from each quarter, of 24 tokens before and after the
one each is chosen by; 10 tokens promoted and 10 suppressed."""
_FEW = 8  # contexts and latents of the first item
Result = TypeVar("Result")


@dataclass(frozen=True)
class Item:
    """A run: how many contexts are read, which latents are reported, and where to."""

    n_contexts: int
    latents: list[int]
    folder: Path


class Task:
    """Settings of a run, and the stopwatch of its stages."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.contexts = np.load(settings["tokens"])
        """int64 [context, pos]."""
        self._folder = Path(settings["folder"])
        self._stages: list[dict[str, float]] = []

    def items(self) -> Iterator[Item | None]:
        """A small run, whole ones, and nothing for the item that is not timed."""
        n = self.settings["n_items"] - 1
        yield self._item(0, _FEW, self.settings["latents"][:_FEW])
        for number in range(1, n):
            yield self._item(number, len(self.contexts), self.settings["latents"])
        yield None

    def _item(self, number: int, n_contexts: int, latents: list[int]) -> Item:
        self._stages.append(defaultdict(float))
        folder = self._folder / str(number)
        folder.mkdir(parents=True)
        return Item(n_contexts, latents, folder)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that something takes to a stage of this item."""
        start = time.perf_counter()
        yield
        self._stages[-1][name] += time.perf_counter() - start

    def timed(self, name: str, function: Callable[..., Result]) -> Callable[..., Result]:
        """The function, its time added to a stage."""

        def run(*arguments: Any, **options: Any) -> Result:
            with self.stage(name):
                return function(*arguments, **options)

        return run

    def tell(self, answers: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        """Seconds of the stages of whole runs, and sizes of what the last one wrote; answers go into a file.

        Args:
            answers: what was found of each latent.
        """
        (self._folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")
        whole = self._stages[1:]
        stages = {name: [round(one[name], 3) for one in whole] for name in whole[0]}
        last = self._folder / str(len(whole))
        pages = sorted(file.stat().st_size for file in last.rglob("*.html") if file.name != "index.html")
        batches = [file.stat().st_size for file in last.rglob("batch-*.json")]
        if self.settings["keep"] is not None:
            shutil.copytree(last, self.settings["keep"], dirs_exist_ok=True)
        return {
            "stages": {name: statistics.median(figures) for name, figures in stages.items()},
            "stages_of_runs": stages,
            "pages": len(pages),
            "page_bytes": {"max": pages[-1], "median": int(statistics.median(pages)), "all": sum(pages)},
            "neuronpedia_bytes": {"files": len(batches), "all": sum(batches)},
        }
