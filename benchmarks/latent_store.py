"""Seconds to build a latent store of 5 million tokens and two models, and to open a latent in it.

    python benchmarks/latent_store.py --json results.json

Run it by the interpreter of the environment that holds saetools; README.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import made_up
import results
import torch
from machine import describe_machine

from saetools.latents import LatentStore, write_latents
from saetools.sae.sparse import TokenMajorPairs

MODELS = ("base", "tuned")
LIMIT = 0.05
WORKER = Path(__file__).with_name("workers") / "open_latent.py"


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    machine = describe_machine()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder)
        build = _build(path, arguments)
        opening = _opening(path, arguments)
    warm = opening["warm"]
    result = {
        "command": results.command("latent_store.py", arguments),
        "date": datetime.date.today().isoformat(),
        "quick": arguments.quick,
        "task": {
            "tokens": arguments.tokens,
            "d_sae": arguments.d_sae,
            "models": len(MODELS),
            "active_a_token": made_up.SLOTS + made_up.N_DENSE / 2,
            "threads": arguments.threads,
        },
        "machine": machine,
        "build": build,
        "opening": {name: {key: each[key] for key in each if key != "seconds"} for name, each in opening.items()},
        "ratios": {"limit of 50 ms": round(LIMIT / warm["median"], 2)},
        "runs": {name: each["seconds"] for name, each in opening.items()},
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"built in {build['seconds']:.0f} s, {build['gib']:.2f} GiB, peak {build['peak_gib']:.2f} GiB")
    for name, each in opening.items():
        print(f"{name}: " + ", ".join(f"{key} {1000 * each[key]:.1f} ms" for key in ("median", "p95", "max")))


def _build(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the store; what making up the pairs takes is not counted."""
    documents = made_up.documents(arguments.tokens)
    spent = {"pairs": 0.0}
    marks: list[float] = []

    def read(some: range) -> dict[str, TokenMajorPairs]:
        start = time.perf_counter()
        n = sum(len(documents[one]) for one in some)
        found = {
            model: made_up.pairs(n, arguments.d_sae, seed=2 * some.start + number)
            for number, model in enumerate(MODELS)
        }
        spent["pairs"] += time.perf_counter() - start
        return found

    directions = torch.nn.functional.normalize(
        torch.randn(arguments.d_sae, 576, generator=torch.Generator().manual_seed(0))
    )
    marks.append(time.perf_counter())
    before, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with _largest_size(path) as sizes:
        write_latents(
            path,
            documents,
            read,
            models=MODELS,
            directions=directions,
            vocabulary=[f" {token}".encode() for token in range(made_up.VOCABULARY)],
            provenance={},
            on_progress=lambda done, total: marks.append(time.perf_counter()),
        )
    stages = [later - earlier for earlier, later in pairwise(marks)]
    n_shards = len(stages) - 1 - 3 * len(MODELS)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": round(sum(stages) - spent["pairs"], 2),
        "seconds_of_stages": {
            "corpus": round(stages[0], 2),
            "shards": round(sum(stages[1 : 1 + n_shards]) - spent["pairs"], 2),
            "by_token": [round(each, 2) for each in stages[1 + n_shards :: 3]],
            "by_latent": [round(each, 2) for each in stages[2 + n_shards :: 3]],
            "coactive": [round(each, 2) for each in stages[3 + n_shards :: 3]],
        },
        "cpu_seconds_with_pairs": round(time.process_time() - cpu, 2),
        "seconds_of_pairs": round(spent["pairs"], 2),
        "gib": round(_bytes(path) / 2**30, 3),
        "peak_gib": round(max(sizes) / 2**30, 3),
        "memory_mib": {"before": before // 1024, "peak": after // 1024},
    }


def _opening(path: Path, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of `open_latent` with its defaults: in one process, and the first one of processes of their own."""
    store = LatentStore(path)
    latents = _chosen(arguments.d_sae, arguments.latents)
    store.open_latent(latents[-1])
    warm, cpu = [], []
    for latent in latents:
        start, cpu_start = time.perf_counter(), time.process_time()
        store.open_latent(latent)
        warm.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    n_active = [store.open_latent(latent, n_top=0, n_bins=0).n_active for latent in latents]
    found = {
        "warm": _summary(warm)
        | {
            "cpu_median": round(statistics.median(cpu), 5),
            "cpu_max": round(max(cpu), 5),
            "latents": len(latents),
            "active_tokens": [min(n_active), max(n_active)],
        },
        "warm, the dense ones": _summary(warm[: made_up.N_DENSE]),
    }
    del store  # what a process has mapped stays in the page cache
    few = latents[:: max(1, len(latents) // arguments.processes)]
    for name, evict in (("first of a process", False), ("first of a process, nothing in the page cache", True)):
        told = [_in_process(path, latent, evict) for latent in few]
        found[name] = _summary([each["store"] + each["latent"] for each in told]) | {
            f"median_of_{part}": round(statistics.median(each[part] for each in told), 5)
            for part in ("store", "latent", "cpu")
        }
    return found


def _in_process(path: Path, latent: int, evict: bool) -> dict[str, float]:
    command = [sys.executable, str(WORKER), str(path), str(latent), *(["evict"] if evict else [])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _summary(seconds: list[float]) -> dict[str, Any]:
    ordered = sorted(seconds)
    return {
        "median": round(statistics.median(ordered), 5),
        "p95": round(ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))], 5),
        "max": round(ordered[-1], 5),
        "seconds": [round(each, 5) for each in seconds],
    }


def _chosen(d_sae: int, n: int) -> list[int]:
    """The dense latents, then others from the most to the least active."""
    n_dense, slots = made_up.N_DENSE, made_up.SLOTS
    others = torch.linspace(n_dense, n_dense + slots * ((d_sae - n_dense) // slots) - 1, n - n_dense)
    return [*range(n_dense), *others.long().tolist()]


@contextmanager
def _largest_size(path: Path) -> Iterator[list[int]]:
    """Bytes of a folder, looked up ten times a second by a thread."""
    sizes, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.1):
            sizes.append(_bytes(path))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield sizes
    finally:
        done.set()
        thread.join()


def _bytes(path: Path) -> int:
    total = 0
    for file in path.iterdir():
        with suppress(FileNotFoundError):  # renamed or removed meanwhile
            total += file.stat().st_size
    return total


def _arguments() -> argparse.Namespace:
    parser = results.parser("latent_store.py", __doc__.splitlines()[0])
    parser.add_argument("--tokens", type=results.count, default=5_000_000)
    parser.add_argument("--d-sae", type=results.count, default=8192)
    parser.add_argument("--latents", type=results.count, default=400, help="opened in one process")
    parser.add_argument("--processes", type=results.count, default=20, help="that open one latent each")
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="with room for 6 GiB; a temporary one by default")
    arguments = results.parse(parser)
    if arguments.quick:
        arguments.tokens, arguments.d_sae, arguments.latents, arguments.processes = 30_000, 512, 50, 3
    return arguments


if __name__ == "__main__":
    main()
