"""What the explorer shows: the files of a run, opened once, and models to ask."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saetools.directions import Direction
from saetools.engine import Engine
from saetools.errors import InputError
from saetools.evaluate.certificate import Certification
from saetools.explore.labels import Labels
from saetools.interpret.explanation import Explanation, load_explanations
from saetools.interpret.text_search import Order, TextSearch, search_text
from saetools.latent_diff import LatentDiff
from saetools.latent_trajectory import Trajectory
from saetools.latents.store import LatentStore
from saetools.models.site import Site
from saetools.report.collect import LatentReporter, certificates_of
from saetools.report.latent_report import LatentReport
from saetools.report.value import PersonaReport
from saetools.sae.model import SAE

if TYPE_CHECKING:
    import polars as pl

_KEPT = 256  # latents whose reports stay in memory


@dataclass(frozen=True)
class Sources:
    """Files of a run.

    Args:
        run: folder of the run; labels are kept in it.
        report: `report.json` of the run.
        diff: folder of a diff.
        store: folder of a latent store.
        certification: `certification.json`.
        explanations: what `saetools explain` wrote.
        trajectory: folder of a trajectory.
    """

    run: Path
    report: Path | None = None
    diff: Path | None = None
    store: Path | None = None
    certification: Path | None = None
    explanations: Path | None = None
    trajectory: Path | None = None

    @classmethod
    def find(cls, run: str | Path, organism: str | None = None) -> Sources:
        """What a folder holds: each under its usual name, there or in a folder below.

        Args:
            run: the folder.
            organism: where it holds results of several, such as `diff-finance` and `diff-sports`, that with this name;
                by default the first.

        Raises:
            InputError: if there is no such folder, nothing to show in it, or nothing of that organism.
        """
        run = Path(run)
        below = sorted(path for path in run.glob("*") if path.is_dir()) if run.is_dir() else []
        if organism is not None:
            own = [path for path in below if path.name.endswith(f"-{organism}")]
            if not own:
                names = [path.name.removeprefix("diff-") for path in below if path.name.startswith("diff-")]
                raise InputError(
                    "organism",
                    expected=", ".join(names) or "none: this run has one",
                    received=repr(organism),
                    remedy="name one of the run",
                )
            below = [*own, *(path for path in below if path not in own)]
        places = [run, *below] if run.is_dir() else []

        def first(name: str) -> Path | None:
            return next((place / name for place in places if (place / name).is_file()), None)

        def folder(name: str) -> Path | None:
            return None if (path := first(name)) is None else path.parent

        found = cls(
            run,
            report=first("report.json"),
            diff=folder("diff.json"),
            store=_store(places),
            certification=first("certification.json"),
            explanations=first("explanations.jsonl"),
            trajectory=folder("trajectory.json"),
        )
        if found == cls(run):
            raise InputError(
                "run",
                expected="a folder with a diff, a latent store or a report",
                received=str(run),
                remedy="run `saetools demo`, `saetools diff` or `saetools index` into it first",
            )
        return found


def _store(places: list[Path]) -> Path | None:
    for place in places:
        try:
            if json.loads((place / "manifest.json").read_text(encoding="utf-8")).get("content") == "latents":
                return place
        except (OSError, ValueError, AttributeError):
            continue
    return None


@dataclass
class Workspace:
    """A run that is looked at.

    Args:
        sources: its files.
        models: `base`, and fine-tunes by name; none if nothing is to be asked.
        sae: the SAE, if there are models.
        site: where it reads.
        sae_source: folder or release that it was loaded from; `None` for the shipped one.
        directions: folders of saved directions by name, for edits.

    Raises:
        InputError: if a source is missing.
        IntegrityError: if one is damaged.
    """

    sources: Sources
    models: Mapping[str, Any] = field(default_factory=dict)
    sae: SAE | None = None
    site: Site | None = None
    sae_source: str | None = None
    directions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        of = self.sources
        self.report = None if of.report is None else PersonaReport.from_json(of.report)
        self.diff = None if of.diff is None else LatentDiff.load(of.diff)
        self.store = None if of.store is None else LatentStore(of.store)
        self.certification = None if of.certification is None else Certification.load(of.certification)
        self.trajectory = None if of.trajectory is None else Trajectory.load(of.trajectory)
        explanations = [] if of.explanations is None else load_explanations(of.explanations)
        self.explanations: dict[int, Explanation] = {one.latent: one for one in explanations}
        self.labels = Labels(of.run / "labels.json")
        self.vectors = {name: Direction.load(folder).vectors for name, folder in self.directions.items()}
        self._tables: dict[str | None, pl.DataFrame] = {}
        self._latent = lru_cache(maxsize=_KEPT)(self._opened)

    @cached_property
    def engine(self) -> Engine:
        """What answers, and all else that runs the models.

        Raises:
            InputError: if there are none.
        """
        if not self.models:
            raise InputError("models", expected="models", received="none", remedy="pass --model or --adapter")
        return Engine(self.models)

    def close(self) -> None:
        """Stop the engine, if it runs."""
        if "engine" in self.__dict__:
            self.engine.close()

    @property
    def roles(self) -> tuple[str, ...]:
        """Token roles that were diffed."""
        return () if self.diff is None else self.diff.positions

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return 0 if self.store is None and self.diff is None else self._reporter.d_sae

    def rows(self, role: str | None) -> pl.DataFrame:
        """All latents of a role, one row each, with labels, verdicts and explanations.

        Args:
            role: one of `roles`; `None` without a diff.

        Raises:
            InputError: for another role.
        """
        import polars as pl

        table = self._rows(role)
        labels = self.labels.all()
        names = pl.Series("label", [labels[latent].label if latent in labels else "" for latent in table["latent"]])
        return table.with_columns(names)

    def _rows(self, role: str | None) -> pl.DataFrame:
        import polars as pl

        if role in self._tables:
            return self._tables[role]
        if self.diff is not None:
            table = self.diff.at(role or self.roles[0]).table.drop("positions")  # type: ignore[arg-type]
        elif self.store is not None:
            active = [len(self.store.activations(latent)) for latent in range(self.store.d_sae)]
            table = pl.DataFrame({"latent": range(len(active)), "n_active": active})
        else:
            table = pl.DataFrame({"latent": []}, schema={"latent": pl.Int64})
        verdicts = {latent: row["verdict"] for latent, row in certificates_of(self.certification).items()}
        texts = {latent: one.text for latent, one in self.explanations.items()}
        self._tables[role] = table.with_columns(
            pl.Series("verdict", [verdicts.get(latent) for latent in table["latent"]], dtype=pl.String),
            pl.Series("explanation", [texts.get(latent) for latent in table["latent"]], dtype=pl.String),
        )
        return self._tables[role]

    def latent(self, latent: int) -> LatentReport:
        """All that is known of a latent; without a store, not where it fires.

        Raises:
            InputError: for a latent that there is not.
        """
        if not 0 <= latent < self.d_sae:
            raise InputError("latent", expected=f"0 to {self.d_sae - 1}", received=latent, remedy="name one of these")
        return self._latent(latent)

    @cached_property
    def _reporter(self) -> LatentReporter:
        return LatentReporter(
            self.store,
            lm=self.models.get("base"),
            sae=self.sae if self.models else None,
            diff=self.diff,
            certification=self.certification,
            explanations=list(self.explanations.values()),
        )

    def _opened(self, latent: int) -> LatentReport:
        def opened() -> LatentReport:
            return next(self._reporter.report([latent]))

        return self.engine.between(opened) if self.models else opened()

    def search(self, text: str, *, n: int = 30) -> TextSearch:
        """The latents that fire on a text, in the first fine-tune against the base if there is one.

        Raises:
            InputError: without models, or for a text that is too short.
        """
        engine, sae = self.engine, self.sae
        assert sae is not None  # there are models
        models = dict(list(self.models.items())[:2])
        order: Order = "increase" if len(models) == 2 else "value"
        return engine.between(lambda: search_text(models, sae, text, order=order, n=n, site=self.site))
