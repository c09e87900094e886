"""Entry point: parse, run one command, turn errors into one line and exit code 2."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from saetools.errors import InputError, SaetoolsError, SaetoolsWarning


def main(args: Sequence[str] | None = None) -> None:
    """Run `saetools` with the given arguments, by default those of the process.

    Exits with 0 on success, 2 on bad input (one line on standard error), 130 when interrupted.
    """
    from rich.console import Console

    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    warnings.showwarning = lambda message, category, *_: (
        errors.print("warning:", str(message), markup=False) if issubclass(category, SaetoolsWarning) else None
    )
    try:
        _parse(args).run()
    except SaetoolsError as error:
        errors.print(f"saetools: {error}", markup=False)
        sys.exit(2)
    except OSError as error:
        errors.print(f"saetools: {error.strerror or error}: {error.filename or ''}".rstrip(": "), markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("saetools: interrupted; what was finished is on disk", markup=False)
        sys.exit(130)


def _parse(args: Sequence[str] | None) -> Any:
    """The command with its options; what the options themselves refuse is raised as it is, not drawn in tyro's box."""
    import tyro

    from saetools.cli.commands import COMMANDS

    args = sys.argv[1:] if args is None else args
    options = [arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")]
    if again := [option for option in options if options.count(option) > 1]:  # tyro would forget all but the last
        raise InputError(again[0], expected="once, with all its values", received="several", remedy="write them in one")
    drawn = io.StringIO()
    try:
        with contextlib.redirect_stderr(drawn):
            return tyro.extras.subcommand_cli_from_dict(
                dict(COMMANDS),
                prog="saetools",
                description="Find the persona a fine-tune woke up, prove it, and switch it off.",
                args=args,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.CascadeSubcommandArgs),
            )
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(drawn.getvalue())
        raise
