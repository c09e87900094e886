"""What the fast step costs in quality: FVU on held-out activations after equal training, saetools beside SAELens.

    python benchmarks/quality_train_sae.py --json quality.json --activations activations.npy

Same data in the same order, same hyper-parameters, several seeds of the initial weights.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import results
from activations import harvested
from interleave import Contestant, Record, interleave
from machine import describe_machine

ROUNDS = 5  # the harness measures time, too; figures of quality do not depend on it
SEEDS = (0, 1, 2)


def main() -> None:
    arguments = _arguments()
    path = arguments.activations or harvested((arguments.steps + 1) * arguments.batch)
    n_batches = min(arguments.steps, len(np.load(path, mmap_mode="r")) // arguments.batch - 1)
    task = {
        "activations": str(path.resolve()),
        "d_sae": arguments.d_sae,
        "k": 32,
        "batch": arguments.batch,
        "lr": arguments.lr,
        "n_batches": n_batches,
    }
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("saetools, int8 encoder", "saetools", {"precision": "int8"}),
        ("saetools, bf16 encoder", "saetools", {"precision": "bf16"}),
        ("SAELens, fp32, sparse activations", "sae_lens", {"precision": "fp32", "sparse": True}),
    ]
    records: dict[str, list[Record]] = {name: [] for name, *_ in kinds}
    for name, library, settings in kinds:
        for seed in SEEDS[: arguments.seeds]:
            contestant = Contestant(
                f"{name}, seed {seed}",
                library,
                f"train_sae.{library}",
                Path(sys.executable),
                {**task, **settings, "seed": seed},
                arguments.batch,
            )
            per_turn = arguments.steps // (ROUNDS + 1)
            records[name] += interleave([contestant], rounds=ROUNDS, items_per_turn=per_turn, threads=arguments.threads)
    fvu = {name: [record.facts["fvu"] for record in each if record.error is None] for name, each in records.items()}
    peer_mean = statistics.mean(fvu[kinds[-1][0]])
    result = {
        "command": results.command("quality_train_sae.py", arguments),
        "date": datetime.date.today().isoformat(),
        "task": {
            **task,
            "activations": path.name,
            "steps": arguments.steps,
            "tokens": arguments.steps * arguments.batch,
        },
        "machine": describe_machine(),
        "fvu": fvu,
        "ratios": {  # of FVU, not of time
            name: round(peer_mean / statistics.mean(values), 4)
            for name, values in fvu.items()
            if name.startswith("saetools") and values
        },
        "runs": {record.contestant.name: record.seconds for each in records.values() for record in each},
        "n_dead": {record.contestant.name: record.facts.get("n_dead") for each in records.values() for record in each},
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, values in fvu.items():
        spread = f", sd {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        mean = statistics.mean(values)
        print(f"{name}: FVU {mean:.4f}{spread}, {mean / peer_mean - 1:+.2%} of SAELens'")


def _arguments() -> argparse.Namespace:
    parser = results.parser("quality_train_sae.py", __doc__.splitlines()[0])
    parser.add_argument("--activations", type=Path, metavar="FILE", help=".npy of float32 [token, d_model]")
    parser.add_argument("--steps", type=results.count, default=96)
    parser.add_argument("--batch", type=results.count, default=4096)
    parser.add_argument("--d-sae", type=results.count, default=8192)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--seeds", type=int, choices=(1, 2, 3), default=3)
    arguments = results.parse(parser)
    if arguments.quick:
        arguments.steps, arguments.batch, arguments.d_sae, arguments.seeds = 12, 512, 1024, 1
    return arguments


if __name__ == "__main__":
    main()
