"""`python -m saetools.planted --out FILE` measures diffs and certificates on planted models; see `--help`."""

import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from saetools.planted.recovery import RecoveryConfig, measure_recovery
from saetools.planted.verdicts import VerdictConfig, measure_verdicts
from saetools.provenance import versions, write_json


@dataclass(frozen=True)
class Measure:
    """Plant models, diff and certify them, and write how well both recover what was planted."""

    out: Path
    """The JSON file."""
    only: Literal["recovery", "verdicts"] | None = None
    """Measure diffs or certificates only, and leave the other part of the file as it is."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    """Settings of the diffs."""
    verdicts: VerdictConfig = field(default_factory=VerdictConfig)
    """Settings of the certificates."""

    def run(self) -> None:
        """Measure and write."""
        from rich.progress import Progress

        kept = json.loads(self.out.read_text(encoding="utf-8")) if self.only and self.out.exists() else {}
        facts = {"command": shlex.join(["python", "-m", "saetools.planted", *sys.argv[1:]]), "versions": versions()}
        with Progress() as bar:
            if self.only != "verdicts":
                diffs = bar.add_task("diffs")
                recovery = measure_recovery(
                    self.recovery, on_progress=lambda done, total: bar.update(diffs, completed=done, total=total)
                )
                kept["recovery"] = {**facts, **dataclasses.asdict(recovery)}
            if self.only != "recovery":
                models = bar.add_task("certificates")
                verdicts = measure_verdicts(
                    self.verdicts, on_progress=lambda done, total: bar.update(models, completed=done, total=total)
                )
                settings = dataclasses.asdict(self.verdicts)
                by_kind = [dataclasses.asdict(one) for one in verdicts]
                kept["verdicts"] = {**facts, "settings": settings, "by_kind": by_kind}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.out, {name: kept[name] for name in ("recovery", "verdicts") if name in kept})


if __name__ == "__main__":
    import tyro

    tyro.cli(Measure).run()
