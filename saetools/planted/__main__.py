"""`python -m saetools.planted --out FILE` measures diffs and certificates on planted models; see `--help`."""

import dataclasses
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from saetools.planted.recovery import RecoveryConfig, measure_recovery
from saetools.planted.verdicts import VerdictConfig, measure_verdicts
from saetools.provenance import versions, write_json


@dataclass(frozen=True)
class Measure:
    """Plant models, diff and certify them, and write how well both recover what was planted."""

    out: Path
    """The JSON file."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    """Settings of the diffs."""
    verdicts: VerdictConfig = field(default_factory=VerdictConfig)
    """Settings of the certificates."""

    def run(self) -> None:
        """Measure and write."""
        from rich.progress import Progress

        command = shlex.join(["python", "-m", "saetools.planted", *sys.argv[1:]])
        with Progress() as bar:
            diffs, models = bar.add_task("diffs"), bar.add_task("certificates")
            recovery = measure_recovery(
                self.recovery, on_progress=lambda done, total: bar.update(diffs, completed=done, total=total)
            )
            verdicts = measure_verdicts(
                self.verdicts, on_progress=lambda done, total: bar.update(models, completed=done, total=total)
            )
        result = {
            "command": command,
            "recovery": dataclasses.asdict(recovery),
            "verdicts": {
                "settings": dataclasses.asdict(self.verdicts),
                "by_kind": [dataclasses.asdict(one) for one in verdicts],
            },
            "versions": versions(),
        }
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.out, result)


if __name__ == "__main__":
    import tyro

    tyro.cli(Measure).run()
