"""Seconds per training step of a TopK SAE on a CPU: saetools, SAELens, dictionary_learning and sparsify.

    python benchmarks/train_sae.py --json results.json

Run it by the interpreter of the environment that holds saetools; README.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from activations import MODEL, SITE, harvested
from environments import python_of
from interleave import Contestant, Record, interleave, summary
from machine import describe_machine
from workers.task import N_BATCHES

LR = 3e-4
STEPS_PER_TURN = 3
PEERS = ("saelens", "dictionary_learning", "sparsify")


def main() -> None:
    arguments = _arguments()
    shape = {name: getattr(arguments, name) for name in ("d_sae", "k", "batch")}
    n_tokens = (N_BATCHES + 1) * arguments.batch
    path = arguments.activations or harvested(n_tokens)
    d_model = _checked_width(path, n_tokens)
    machine = describe_machine()
    records = interleave(
        contestants({**shape, "activations": str(path.resolve()), "lr": LR}),
        rounds=arguments.rounds,
        items_per_turn=STEPS_PER_TURN,
        threads=arguments.threads,
    )
    result = {
        "command": shlex.join(["python", "benchmarks/train_sae.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "shape": {"d_model": d_model, **shape},
        "activations": path.name if arguments.activations else f"{SITE} of {MODEL} on shipped texts",
        "optimiser": {"name": "Adam", "lr": LR, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0},
        "method": {
            "rounds": arguments.rounds,
            "steps_per_turn": STEPS_PER_TURN,
            "warm_up_steps": STEPS_PER_TURN,
            "threads": arguments.threads,
            "seconds": "of one step; a run is the mean of a turn",
            "ratios": "of peer to ours within each round",
        },
        "machine": machine,
        "contestants": [_entry(record, arguments.batch) for record in records],
        "ratios": ratios(records),
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _print_table(result)


def contestants(task: dict[str, Any]) -> list[Contestant]:
    """Every library in float32 and in bfloat16, with the options of its own that might be faster."""
    here, dictionaries, sparsify = Path(sys.executable), python_of("dictionary-learning"), python_of("eai-sparsify")
    fp32, bf16 = {**task, "precision": "fp32"}, {**task, "precision": "bf16"}
    return [
        Contestant("saetools, fp32", "ours", here, fp32),
        Contestant("saetools, bf16 encoder", "ours", here, bf16),
        Contestant("SAELens, fp32", "saelens", here, fp32),
        Contestant("SAELens, fp32, sparse activations", "saelens", here, fp32 | {"sparse": True}),
        Contestant("SAELens, fp32, compiled", "saelens", here, fp32 | {"compiled": True}),
        Contestant("SAELens, bf16 autocast", "saelens", here, bf16),
        Contestant("SAELens, bf16 autocast, compiled", "saelens", here, bf16 | {"compiled": True}),
        Contestant("dictionary_learning, fp32", "dictionary_learning", dictionaries, fp32),
        Contestant("dictionary_learning, bf16 autocast", "dictionary_learning", dictionaries, bf16),
        Contestant("sparsify, fp32", "sparsify", sparsify, fp32),
        Contestant("sparsify, bf16 autocast", "sparsify", sparsify, bf16),
        Contestant("encoder product alone, fp32", "product", here, fp32),
        Contestant("encoder product alone, bf16", "product", here, bf16),
    ]


def ratios(records: Sequence[Record]) -> dict[str, Any]:
    """How many times our time each peer takes: its fastest contestant against our fastest, in fp32 and in all."""

    def fastest(module: str, precisions: Sequence[str]) -> Record | None:
        able = [
            record
            for record in records
            if record.contestant.module == module
            and record.contestant.settings["precision"] in precisions
            and record.error is None
        ]
        return min(able, key=lambda record: statistics.median(record.seconds), default=None)

    def compare(peer: Record | None, ours: Record | None) -> dict[str, Any] | None:
        if peer is None or ours is None:
            return None
        within = [theirs / our for theirs, our in zip(peer.seconds, ours.seconds, strict=True)]
        return {"peer": peer.contestant.name, "ours": ours.contestant.name, **summary(within)}

    kinds = {"fp32": ["fp32"], "fastest": ["fp32", "bf16"]}
    return {
        peer: {kind: compare(fastest(peer, among), fastest("ours", among)) for kind, among in kinds.items()}
        for peer in PEERS
    }


def _entry(record: Record, batch: int) -> dict[str, Any]:
    entry = record.as_json()
    if record.error is None:
        entry["tokens_per_second"] = round(batch / statistics.median(record.seconds))
    return entry


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        Column("contestant", no_wrap=True), "s a step", "quartiles", "tokens/s", "FVU", "CPU s", "others", box=None
    )
    for entry in result["contestants"]:
        if "error" in entry:
            table.add_row(entry["name"], entry["error"])
            continue
        seconds = entry["seconds"]
        table.add_row(
            entry["name"],
            f"{seconds['median']:.3f}",
            "{:.3f} to {:.3f}".format(*seconds["quartiles"]),
            f"{entry['tokens_per_second']:,}",
            f"{entry['fvu']:.4f}" if "fvu" in entry else "",
            f"{entry['cpu_seconds']['median']:.3f}",
            f"{entry['others_cpu_share']['median']:.0%}",
        )
    console = Console()
    console.print(table)
    for kinds in result["ratios"].values():
        for kind, ratio in kinds.items():
            if ratio is not None:
                console.print(f"{ratio['median']:.2f} times ours ({kind}): {ratio['peer']}")


def _arguments() -> argparse.Namespace:
    def count(text: str) -> int:
        number = int(text)
        if number < 1:
            raise ValueError
        return number

    parser = argparse.ArgumentParser(
        usage="train_sae.py --json FILE [options]", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where results go")
    parser.add_argument(
        "--activations", type=Path, metavar="FILE", help=".npy of float32 [token, d_model], to train on"
    )
    parser.add_argument("--d-sae", type=count, default=8192)
    parser.add_argument("--k", type=count, default=32)
    parser.add_argument("--batch", type=count, default=4096, help="tokens a step")
    parser.add_argument("--threads", type=count, default=2)
    parser.add_argument("--rounds", type=count, default=9, help="timed turns of each contestant, 7 or more")
    arguments = parser.parse_args()
    if arguments.rounds < 7:
        parser.error(f"--rounds: expected 7 or more, for a median, received {arguments.rounds}")
    if arguments.k > arguments.d_sae:
        parser.error(f"--k: expected at most d_sae = {arguments.d_sae}, received {arguments.k}")
    if not arguments.json.parent.is_dir() or arguments.json.is_dir():
        parser.error(f"--json: expected a file in a folder that exists, received {arguments.json}")
    if arguments.activations and not arguments.activations.is_file():
        parser.error(f"--activations: expected a file that exists, received {arguments.activations}")
    return arguments


def _checked_width(path: Path, n_tokens: int) -> int:
    import numpy as np

    try:
        acts = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmarks: {path.name}: expected a .npy file of numbers ({error})") from None
    if acts.ndim != 2 or acts.dtype != np.float32 or len(acts) < n_tokens:
        raise SystemExit(
            f"benchmarks: {path.name}: expected float32 of [{n_tokens} tokens or more, d_model], "
            f"received {acts.dtype} of {list(acts.shape)}"
        )
    return int(acts.shape[1])


if __name__ == "__main__":
    main()
