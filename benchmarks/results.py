"""What every benchmark shares: its options, and the JSON and the table that it leaves.

`ratios` holds, for each peer or limit, its median time over ours: above 1 ours is faster. Each is the fastest of its
library against the fastest of ours. `runs` holds every timing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from interleave import Record, summary

OURS = "saetools"


def parser(script: str, description: str, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """The options of all benchmarks, `--rounds` of those with a number of them; add others, then parse with `parse`."""
    parser = argparse.ArgumentParser(
        usage=f"{script} --json FILE [options]", description=description, allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where results go")
    parser.add_argument("--quick", action="store_true", help="small and short, to see that it runs; under a minute")
    parser.add_argument("--threads", type=count, default=2)
    if rounds is not None:
        parser.add_argument("--rounds", type=count, default=rounds, help="timed turns of each contestant, 7 or more")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Checked options."""
    arguments = parser.parse_args()
    if "rounds" in arguments:
        if arguments.quick:
            arguments.rounds = 3
        elif arguments.rounds < 7:
            parser.error(f"--rounds: expected 7 or more, for a median, received {arguments.rounds}")
    if not arguments.json.parent.is_dir() or arguments.json.is_dir():
        parser.error(f"--json: expected a file in a folder that exists, received {arguments.json}")
    return arguments


def count(text: str) -> int:
    """A number of 1 or more."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def median_seconds(record: Record) -> float:
    """Of an item."""
    return statistics.median(record.seconds)


def fastest(
    records: Sequence[Record], library: str, among: Callable[[dict[str, Any]], bool] = lambda settings: True
) -> Record | None:
    """The contestant of a library with the least median time, of those that ran and whose settings pass."""
    able = [
        record
        for record in records
        if record.contestant.library == library and record.error is None and among(dict(record.contestant.settings))
    ]
    return min(able, key=median_seconds, default=None)


def ratio(peer: Record | None, ours: Record | None) -> dict[str, Any] | None:
    """How many times our time the peer takes, within each round."""
    if peer is None or ours is None:
        return None
    within = [theirs / our for theirs, our in zip(peer.seconds, ours.seconds, strict=True)]
    return {"peer": peer.contestant.name, "ours": ours.contestant.name, **summary(within)}


def ratios(
    records: Sequence[Record], among: Callable[[dict[str, Any]], bool] = lambda settings: True
) -> dict[str, dict[str, Any]]:
    """`ratio` of every library to ours, each by its fastest contestant whose settings pass."""
    libraries = dict.fromkeys(record.contestant.library for record in records)
    compared = {
        library: ratio(fastest(records, library, among), fastest(records, OURS, among))
        for library in libraries
        if library != OURS
    }
    return {library: found for library, found in compared.items() if found is not None}


def write(
    arguments: argparse.Namespace,
    script: str,
    records: Sequence[Record],
    compared: dict[str, dict[str, Any]],
    **facts: Any,
) -> None:
    """Write the JSON file and print a table.

    Args:
        arguments: checked options.
        script: name of the benchmark.
        records: of all contestants.
        compared: `ratio` of each peer or limit.
        facts: whatever else belongs into the file.
    """
    result = {
        "command": command(script, arguments),
        "date": datetime.date.today().isoformat(),
        "quick": arguments.quick,
        **facts,
        "ratios": {name: found["median"] for name, found in compared.items()},
        "compared": compared,
        "runs": {record.contestant.name: [round(seconds, 5) for seconds in record.seconds] for record in records},
        "contestants": [record.as_json() for record in records],
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _print_table(records, compared)


def command(script: str, arguments: argparse.Namespace) -> str:
    """The call with all its options; of files only the names."""
    words = ["python", f"benchmarks/{script}"]
    for name, value in vars(arguments).items():
        if value is not None and value is not False:
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else [value.name if isinstance(value, Path) else str(value)]
    return shlex.join(words)


def _print_table(records: Sequence[Record], compared: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        Column("contestant", no_wrap=True), "s", "quartiles", "tokens/s", "FVU", "CPU s", "others", "MiB", box=None
    )
    for record in records:
        if record.error is not None:
            table.add_row(record.contestant.name, record.error)
            continue
        seconds, facts = summary(record.seconds), record.facts
        table.add_row(
            record.contestant.name,
            f"{seconds['median']:.3f}",
            "{:.3f} to {:.3f}".format(*seconds["quartiles"]),
            f"{record.tokens_per_second():,}",
            f"{facts['fvu']:.4f}" if "fvu" in facts else "",
            f"{statistics.median(record.cpu_seconds):.3f}",
            f"{statistics.median(record.others_cpu_share):.0%}",
            f"{facts['memory_mib']['peak'] - facts['memory_mib']['before']:,}",
        )
    console = Console(width=140)
    console.print(table)
    for name, found in compared.items():
        console.print(f"{found['median']:.2f} times ours: {name} ({found['peer']} / {found['ours']})")
