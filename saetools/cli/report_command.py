"""The command that writes reports: of a run, or of latents."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from saetools.cli.options import ModelOptions, SAEOptions, at_least, progress
from saetools.cli.output import check_folder
from saetools.errors import InputError
from saetools.report.latent_write import LatentFormat

if TYPE_CHECKING:
    from saetools.latent_diff import LatentDiff
    from saetools.latents import LatentStore


@dataclass(frozen=True)
class Report:
    """Draw the report of a run again, or write what is known of latents: where they fire, what they do."""

    run_folder: Annotated[str | None, tyro.conf.Positional] = None
    """Folder with the report.json of a run, to draw that report again."""
    store: str | None = None
    """Instead, folder that `saetools index` wrote, to report latents."""
    out: str | None = None
    """Where: a new folder for latents; by default the run's own folder for its report."""
    latents: tuple[int, ...] = ()
    """Which latents; by default the largest increases of the diff."""
    n_top: int = 20
    """How many of those."""
    every: bool = False
    """Instead, all latents that are active somewhere in the store."""
    diff: str | None = None
    """Folder that `saetools diff` wrote with the same SAE."""
    certification: str | None = None
    """File certification.json that `saetools certify` wrote."""
    explanations: str | None = None
    """File that `saetools explain` wrote."""
    format: tuple[LatentFormat, ...] = ()
    """What to write. Of a run: html, markdown (the default), json, and parquet or csv of its scores, latents and doses.
    Of latents: html (20 a page, and a table of all), markdown, json (one line a latent), parquet, csv (the default),
    neuronpedia (batches as its uploads take them)."""
    title: str | None = None
    """Headline; by default the models and the store."""
    lm: ModelOptions = field(default_factory=ModelOptions)
    sae: SAEOptions = field(default_factory=SAEOptions)

    def __post_init__(self) -> None:
        at_least(1, "--n-top", self.n_top)
        if (self.run_folder is None) == (self.store is None):
            raise InputError(
                "--store",
                expected="a run's folder, or --store to report latents",
                received="none" if self.store is None else "both",
                remedy="give one",
            )
        if self.store is None:
            return
        if self.out is None:
            raise InputError("--out", expected="a new folder for latents", received="none", remedy="name one")
        if self.latents and self.every:
            raise InputError("--latents", expected="these or --every", received="both", remedy="give one")
        if not self.latents and not self.every and self.diff is None:
            raise InputError(
                "--latents",
                expected="latents, or --diff for its largest increases, or --every",
                received="none",
                remedy="give one",
            )

    def run(self) -> None:
        """Read, write, say where."""
        files = self._of_run(self.run_folder) if self.run_folder is not None else self._of_latents(str(self.store))
        for file in files.values():
            print(file)

    def _of_run(self, folder: str) -> dict[str, Path]:
        from saetools.report import PersonaReport, write_report

        report = PersonaReport.from_json(Path(folder) / "report.json")
        return write_report(report, Path(self.out or folder), formats=self.format or ("html", "markdown"))

    def _of_latents(self, folder: str) -> dict[str, Path]:
        from saetools.evaluate import Certification
        from saetools.interpret import load_explanations
        from saetools.latent_diff import LatentDiff
        from saetools.latents import LatentStore
        from saetools.report import NeuronpediaNames, report_latents, write_latent_reports

        out = Path(str(self.out))
        check_folder(out.parent)
        store = LatentStore(folder)
        diff = None if self.diff is None else LatentDiff.load(self.diff)
        latents = self._latents(store, diff)
        certification = None if self.certification is None else Certification.load(self.certification)
        explanations = [] if self.explanations is None else load_explanations(self.explanations)
        lm = self.lm.load()
        sae, _ = self.sae.load(lm)
        found = report_latents(
            store, latents, lm=lm, sae=sae, diff=diff, certification=certification, explanations=explanations
        )
        with progress("report", "latents") as update:
            return write_latent_reports(
                found,
                latents,
                out,
                formats=self.format or ("html", "markdown", "json", "parquet", "csv"),
                title=self.title or f"{len(latents)} latents of {' and '.join(store.models)}",
                neuronpedia=NeuronpediaNames.of_store(store.manifest),
                on_progress=update,
            )

    def _latents(self, store: LatentStore, diff: LatentDiff | None) -> list[int]:
        if self.latents:
            return list(dict.fromkeys(self.latents))
        if self.every or diff is None:
            return store.active_latents()
        role = diff.at("response" if "response" in diff.positions else diff.positions[0])
        found: list[int] = role.top(self.n_top)["latent"].to_list()
        return found
