"""Seconds per training step of a TopK SAE on a CPU or a GPU: saetools, SAELens, dictionary_learning and sparsify.

    python benchmarks/train_sae.py --json results.json
    python benchmarks/train_sae.py --device cuda --json results.json

Run it by the interpreter of the environment that holds saetools; README.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import results
from activations import MODEL, SITE, harvested
from environments import python_of
from interleave import Contestant, interleave
from machine import describe_machine
from workers.train_sae.task import N_BATCHES

LR = 3e-4
STEPS_PER_TURN = 3
GPU_STEPS_PER_TURN = 50


def main() -> None:
    arguments = _arguments()
    shape = {name: getattr(arguments, name) for name in ("d_sae", "k", "batch")}
    n_tokens = (N_BATCHES + 1) * arguments.batch
    path = arguments.activations or harvested(n_tokens)
    d_model = _checked_width(path, n_tokens)
    machine = describe_machine(arguments.device)
    field = contestants({**shape, "activations": str(path.resolve()), "lr": LR, "device": arguments.device})
    steps = GPU_STEPS_PER_TURN if arguments.device == "cuda" else STEPS_PER_TURN
    records = interleave(
        [one for one in field if _runs(one, arguments)],
        rounds=arguments.rounds,
        items_per_turn=steps,
        threads=arguments.threads,
    )
    compared = results.ratios(records)
    gemm = results.fastest(records, "encode_gemm", lambda settings: settings["precision"] == "bf16")
    compared.pop("encode_gemm", None)
    if against := results.ratio(gemm, results.fastest(records, results.OURS)):
        compared["encode_gemm_bf16"] = against
    results.write(
        arguments,
        "train_sae.py",
        records,
        compared,
        compared_fp32=results.ratios(records, lambda settings: settings["precision"] == "fp32"),
        compared_bf16=results.ratios(records, lambda settings: settings["precision"] != "int8"),
        shape={"d_model": d_model, **shape},
        activations=path.name if arguments.activations else f"{SITE} of {MODEL} on shipped texts",
        optimiser={"name": "Adam", "lr": LR, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0},
        method={
            "rounds": arguments.rounds,
            "steps_per_turn": steps,
            "warm_up_steps": steps,
            "threads": arguments.threads,
            "seconds": "of one step; a run is the mean of a turn",
            "ratios": "of peer to ours within each round, medians",
        },
        machine=machine,
    )


def contestants(task: dict[str, Any]) -> list[Contestant]:
    """Every library in float32 and in bfloat16, with the options of its own that might be faster."""
    here, dictionaries, sparsify = Path(sys.executable), python_of("dictionary-learning"), python_of("eai-sparsify")

    def one(name: str, library: str, precision: str, python: Path = here, **options: Any) -> Contestant:
        settings = {**task, "precision": precision, **options}
        return Contestant(name, library, f"train_sae.{library}", python, settings, task["batch"])

    return [
        one("saetools, fp32", "saetools", "fp32"),
        one("saetools, bf16 encoder", "saetools", "bf16"),
        one("saetools, int8 encoder", "saetools", "int8"),
        one("SAELens, fp32", "sae_lens", "fp32"),
        one("SAELens, fp32, sparse activations", "sae_lens", "fp32", sparse=True),
        one("SAELens, fp32, compiled", "sae_lens", "fp32", compiled=True),
        one("SAELens, bf16 autocast", "sae_lens", "bf16"),
        one("SAELens, bf16 autocast, sparse activations", "sae_lens", "bf16", sparse=True),
        one("SAELens, bf16 autocast, compiled", "sae_lens", "bf16", compiled=True),
        one("dictionary_learning, fp32", "dictionary_learning", "fp32", dictionaries),
        one("dictionary_learning, bf16 autocast", "dictionary_learning", "bf16", dictionaries),
        one("sparsify, fp32", "sparsify", "fp32", sparsify),
        one("sparsify, bf16 autocast", "sparsify", "bf16", sparsify),
        one("encoder product alone, fp32", "encode_gemm", "fp32"),
        one("encoder product alone, bf16", "encode_gemm", "bf16"),
    ]


def _runs(contestant: Contestant, arguments: argparse.Namespace) -> bool:
    """Compiling takes long, and the 8-bit product is for CPUs."""
    if arguments.quick and contestant.settings.get("compiled"):
        return False
    return arguments.device == "cpu" or contestant.settings["precision"] != "int8"


def _arguments() -> argparse.Namespace:
    parser = results.parser("train_sae.py", __doc__.splitlines()[0], rounds=9)
    parser.add_argument(
        "--activations", type=Path, metavar="FILE", help=".npy of float32 [token, d_model], to train on"
    )
    parser.add_argument("--d-sae", type=results.count, default=8192)
    parser.add_argument("--k", type=results.count, default=32)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=results.count, default=4096, help="tokens a step")
    arguments = results.parse(parser)
    if arguments.quick:
        arguments.d_sae, arguments.batch = 2048, 512
    if arguments.k > arguments.d_sae:
        parser.error(f"--k: expected at most d_sae = {arguments.d_sae}, received {arguments.k}")
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
