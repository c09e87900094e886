"""`python -m saetools.planted --out FILE` measures recovery and writes it as JSON; `--help` lists the settings."""

import shlex
import sys
from pathlib import Path

from saetools.planted.recovery import RecoveryConfig, measure_recovery

_DEFAULT = RecoveryConfig()


def main(out: Path, config: RecoveryConfig = _DEFAULT) -> None:
    """Plant models, diff them and write how well the diffs recover what was planted.

    Args:
        out: the JSON file.
        config: settings.
    """
    from rich.progress import Progress

    command = shlex.join(["python", "-m", "saetools.planted", *sys.argv[1:]])
    with Progress() as bar:
        task = bar.add_task("diffs")
        found = measure_recovery(config, on_progress=lambda done, total: bar.update(task, completed=done, total=total))
    found.save(out, command=command)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
