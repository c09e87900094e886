"""Entry point: parse, run one command, turn errors into one line and exit code 2."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from saetools.errors import SaetoolsError, SaetoolsWarning


def main(args: Sequence[str] | None = None) -> None:
    """Run `saetools` with the given arguments, by default those of the process.

    Exits with 0 on success, 2 on bad input (one line on standard error), 130 when interrupted.
    """
    import tyro
    from rich.console import Console

    from saetools.cli.commands import COMMANDS

    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    warnings.showwarning = lambda message, category, *_: (
        errors.print("warning:", str(message), markup=False) if issubclass(category, SaetoolsWarning) else None
    )
    command = tyro.extras.subcommand_cli_from_dict(
        dict(COMMANDS),
        prog="saetools",
        description="Find the persona a fine-tune woke up, prove it, and switch it off.",
        args=args,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.CascadeSubcommandArgs),
    )
    try:
        command.run()
    except SaetoolsError as error:
        errors.print(f"saetools: {error}", markup=False)
        sys.exit(2)
    except OSError as error:
        errors.print(f"saetools: {error.strerror or error}: {error.filename or ''}".rstrip(": "), markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("saetools: interrupted; what was finished is on disk", markup=False)
        sys.exit(130)
