"""Tokens per second of reading a language model's activations on a CPU: saetools, SAELens and nnsight.

    python benchmarks/harvest.py --json results.json

Run it by the interpreter of the environment that holds saetools; README.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import results
from activations import MODEL, SITE, packed, stored
from environments import python_of
from interleave import Contestant, Record, interleave
from machine import describe_machine

N_BATCHES = 4
LAYER = int(SITE.split(".")[1])


def main() -> None:
    arguments = _arguments()
    batch = arguments.contexts * arguments.length
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        task = _prepare(Path(folder), arguments)
        records = interleave(
            contestants(task, batch, arguments), rounds=arguments.rounds, items_per_turn=1, threads=arguments.threads
        )
    records = [_per_item(record, batch) for record in records]
    results.write(
        arguments,
        "harvest.py",
        records,
        _compared(records),
        compared_fp32=_streams_compared(records, "fp32"),
        compared_bf16=_streams_compared(records, "bf16"),
        shape={"model": MODEL, "site": SITE, "contexts": arguments.contexts, "length": arguments.length},
        method={
            "rounds": arguments.rounds,
            "threads": arguments.threads,
            "store_tokens": arguments.store_contexts * (arguments.length - 1),
            "seconds": "of one batch; reading from disk: of an epoch, brought to as many tokens",
            "ratios": "of peer to ours within each round, medians",
            "quality": "of the last batch, first positions left out, against the bare model in float32",
        },
        machine=machine,
    )


def contestants(task: dict[str, Any], batch: int, arguments: argparse.Namespace) -> list[Contestant]:
    """Every library in float32 and in bfloat16; ours also to disk and from it."""
    here, nnsight = Path(sys.executable), python_of("nnsight")
    n_stored = arguments.store_contexts * (arguments.length - 1)

    def one(name: str, module: str, precision: str, *, python: Path = here, n: int = batch) -> Contestant:
        return Contestant(name, module, f"harvest.{module}", python, {**task, "precision": precision}, n)

    field = [
        one("bare forward, fp32", "bare_forward", "fp32"),
        one("bare forward, bf16", "bare_forward", "bf16"),
        one("bare forward, bf16 autocast", "bare_forward", "autocast"),
        one("saetools, fp32", "saetools", "fp32"),
        one("saetools, bf16", "saetools", "bf16"),
        one("saetools, fp32, to disk", "saetools_disk", "fp32"),
        one("saetools, bf16, to disk", "saetools_disk", "bf16"),
        one("saetools, from disk", "saetools_store", "bf16", n=n_stored // batch * batch),
        one("SAELens, fp32", "sae_lens", "fp32"),
        one("SAELens, bf16", "sae_lens", "bf16"),
        one("SAELens, bf16 autocast", "sae_lens", "autocast"),
        one("SAELens, from disk", "sae_lens_cache", "fp32", n=n_stored // batch * batch),
        one("nnsight, fp32", "nnsight", "fp32", python=nnsight),
        one("nnsight, bf16", "nnsight", "bf16", python=nnsight),
    ]
    quick = [one for one in field if one.settings["precision"] == "bf16" and "to disk" not in one.name]
    return quick if arguments.quick else field


def _prepare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What all workers read: tokens, the bare model's own activations, a store, the shipped SAE."""
    import numpy as np
    import torch
    from workers.harvest.bare_forward import forward, stopping
    from workers.harvest.task import load

    from saetools import shipped_path
    from saetools.models.builtin import fetch_builtin

    model, sae = fetch_builtin(MODEL), shipped_path("sae/smollm2-135m")
    tokens = packed(N_BATCHES * arguments.contexts, arguments.length).reshape(N_BATCHES, -1, arguments.length)
    np.save(folder / "tokens.npy", tokens)
    bare = stopping(load(str(model), "fp32"), LAYER)
    np.save(folder / "reference.npy", np.stack([forward(bare, torch.from_numpy(ids)).numpy() for ids in tokens]))
    return {
        "model": str(model),
        "layer": LAYER,
        "tokens": str(folder / "tokens.npy"),
        "reference": str(folder / "reference.npy"),
        "store": str(stored(arguments.store_contexts, arguments.length)),
        "batch": arguments.contexts * arguments.length,
        "sae": str(sae),
        "k": json.loads((sae / "cfg.json").read_text(encoding="utf-8"))["k"],
    }


def _per_item(record: Record, batch: int) -> Record:
    """The same with times of one batch, also where an item was more."""
    share = batch / record.contestant.tokens_per_item
    return dataclasses.replace(
        record,
        contestant=dataclasses.replace(record.contestant, tokens_per_item=batch),
        seconds=[seconds * share for seconds in record.seconds],
        cpu_seconds=[seconds * share for seconds in record.cpu_seconds],
    )


def _compared(records: list[Record]) -> dict[str, dict[str, Any]]:
    """Ratios of streams at any dtype and at equal ones, and those of stores on disk."""
    stream, disk, store = (results.fastest(records, f"saetools{kind}") for kind in ("", "_disk", "_store"))
    bare_fp32 = results.fastest(records, "bare_forward", lambda settings: settings["precision"] == "fp32")
    compared = {
        **_streams_compared(records),
        **{
            f"bare_forward_{dtype}": _streams_compared(records, dtype).get("bare_forward") for dtype in ("fp32", "bf16")
        },
        "bare_forward_fp32_to_our_bf16": results.ratio(bare_fp32, stream),
        "bare_forward_to_disk": results.ratio(results.fastest(records, "bare_forward"), disk),
        "harvest_again": results.ratio(stream, store),
        "sae_lens_cache": results.ratio(results.fastest(records, "sae_lens_cache"), store),
    }
    return {name: found for name, found in compared.items() if found is not None}


def _streams_compared(records: list[Record], precision: str | None = None) -> dict[str, dict[str, Any]]:
    compared = results.ratios(records, lambda settings: precision in (None, settings["precision"]))
    return {name: found for name, found in compared.items() if name in ("bare_forward", "sae_lens", "nnsight")}


def _arguments() -> argparse.Namespace:
    parser = results.parser("harvest.py", __doc__.splitlines()[0], rounds=9)
    parser.add_argument("--contexts", type=results.count, default=16, help="in a batch")
    parser.add_argument("--length", type=results.count, default=128, help="of a context, in tokens")
    parser.add_argument("--store-contexts", type=results.count, default=512, help="in the store that is read from disk")
    arguments = results.parse(parser)
    if arguments.quick:
        arguments.contexts, arguments.store_contexts = 2, 32
    return arguments


if __name__ == "__main__":
    main()
