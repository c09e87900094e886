"""Seconds to measure how often and how strongly latents fire on a CPU: saetools, SAELens and others.

    python benchmarks/encode.py --json results.json

Run it by the interpreter of the environment that holds saetools; README.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import results
from activations import SITE, stored
from environments import python_of
from interleave import Contestant, Record, interleave
from machine import describe_machine

SAE = "sae/smollm2-135m"


def main() -> None:
    arguments = _arguments()
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        saes, task = _prepare(Path(folder), arguments.tokens, arguments.contexts)
        records = interleave(
            contestants(saes, task, arguments), rounds=arguments.rounds, items_per_turn=1, threads=arguments.threads
        )
    results.write(
        arguments,
        "encode.py",
        records,
        _compared(records),
        compared_fp32=results.ratios(records, lambda settings: settings["precision"] == "fp32"),
        compared_same_statistics=results.ratios(records, lambda settings: settings["everything"]),
        sae=SAE,
        activations=f"{SITE} on shipped texts",
        in_all=[_in_all(record, arguments) for record in records if record.error is None],
        method={
            "rounds": arguments.rounds,
            "tokens_a_turn": arguments.tokens,
            "threads": arguments.threads,
            "seconds": "of one turn",
            "ratios": "of peer to ours within each round, medians",
            "in_all": "sums over all timed turns",
            "errors": "sums of absolute differences to the dense formula in float32, over the sums",
        },
        machine=machine,
    )


def contestants(saes: dict[str, str], task: dict[str, Any], arguments: argparse.Namespace) -> list[Contestant]:
    """Every library in float32 and in bfloat16, the peers at several batch sizes."""
    here, dictionaries, sparsify = Path(sys.executable), python_of("dictionary-learning"), python_of("eai-sparsify")

    def one(
        name: str, library: str, precision: str, batch: int, *, python: Path = here, everything: bool = True
    ) -> Contestant:
        settings = {**task, "sae": saes.get(library), "precision": precision, "batch": batch, "everything": everything}
        return Contestant(name, library, f"encode.{library}", python, settings, arguments.tokens)

    field = [
        one("saetools, fp32", "saetools", "fp32", 0),
        one("saetools, bf16 proposes", "saetools", "bf16", 0),
        one("saetools, int8 proposes", "saetools", "int8", 0),
        one("SAELens, fp32, all at once, means", "sae_lens", "fp32", arguments.tokens, everything=False),
        one("SAELens, fp32, 4096 at a time, means", "sae_lens", "fp32", 4096, everything=False),
        one("SAELens, fp32, 512 at a time, means", "sae_lens", "fp32", 512, everything=False),
        one("SAELens, fp32, 512 at a time", "sae_lens", "fp32", 512),
        one("SAELens, bf16 autocast, 4096 at a time, means", "sae_lens", "bf16", 4096, everything=False),
        one("SAELens, bf16 autocast, 512 at a time, means", "sae_lens", "bf16", 512, everything=False),
        one("SAELens, bf16 autocast, 512 at a time", "sae_lens", "bf16", 512),
        one("dictionary_learning, fp32", "dictionary_learning", "fp32", 512, python=dictionaries),
        one("dictionary_learning, bf16 autocast", "dictionary_learning", "bf16", 512, python=dictionaries),
        one("sparsify, fp32", "sparsify", "fp32", 512, python=sparsify),
        one("sparsify, bf16 autocast", "sparsify", "bf16", 512, python=sparsify),
        one("encoder product alone, fp32", "encode_gemm", "fp32", 512),
        one("encoder product alone, bf16", "encode_gemm", "bf16", 512),
        one("encoder product alone, int8", "encode_gemm", "int8", 512),
    ]
    quick = [one for one in field if one.settings["precision"] != "fp32" and "4096" not in one.name]
    return quick if arguments.quick else field


def _prepare(folder: Path, n_tokens: int, n_contexts: int) -> tuple[dict[str, str], dict[str, Any]]:
    """The shipped SAE in the format of each library, activations of its site, and their statistics by the formula."""
    import numpy as np

    from saetools import ActivationStore, Site, load_sae, save_sae, shipped_path

    sae = load_sae(shipped_path(SAE))
    acts = ActivationStore(stored(n_contexts, 128)).at(Site.parse(SITE)).sample(n_tokens, seed=0).float()
    np.save(folder / "activations.npy", acts.numpy())
    np.save(folder / "reference.npy", _reference(sae, acts).numpy())
    saes = {library: str(shipped_path(SAE)) for library in ("saetools", "sae_lens")}
    for library in ("sparsify", "dictionary_learning"):
        saes[library] = str(save_sae(sae, folder / library, format=library))
    return saes, {"activations": str(folder / "activations.npy"), "reference": str(folder / "reference.npy")}


def _reference(sae: Any, acts: Any) -> Any:
    """Mean, rate and maximum [3, d_sae] of dense latents in float32."""
    import torch

    rows = []
    with torch.inference_mode():
        for batch in acts.split(4096):
            pre = (batch - sae.b_dec) @ sae.W_enc + sae.b_enc
            top = pre.topk(sae.nonlinearity.k, dim=1)
            latents = torch.zeros_like(pre).scatter_(1, top.indices, top.values.relu())
            rows.append(torch.stack([latents.sum(0), (latents > 0).sum(0), latents.amax(0)]))
    sums, fired, largest = torch.stack(rows, 1)
    return torch.stack([sums.sum(0) / len(acts), fired.sum(0) / len(acts), largest.amax(0)])


def _compared(records: list[Record]) -> dict[str, dict[str, Any]]:
    """Ratios to our fastest; SAELens may leave out everything but means."""
    ours = results.fastest(records, results.OURS)
    bf16 = results.fastest(records, "encode_gemm", lambda settings: settings["precision"] == "bf16")
    sae_lens_fp32 = results.fastest(records, "sae_lens", lambda settings: settings["precision"] == "fp32")
    compared = results.ratios(records)
    compared["sae_lens_fp32"] = results.ratio(sae_lens_fp32, ours)
    compared["encode_gemm_bf16"] = results.ratio(bf16, ours)
    return {name: found for name, found in compared.items() if found is not None and name != "encode_gemm"}


def _in_all(record: Record, arguments: argparse.Namespace) -> dict[str, Any]:
    """What all turns together took."""
    memory = record.facts["memory_mib"]
    return {
        "name": record.contestant.name,
        "tokens": arguments.tokens * len(record.seconds),
        "seconds": round(sum(record.seconds) + record.facts.get("seconds_at_end", 0.0), 3),
        "memory_mib": memory["peak"] - memory["before"],
    }


def _arguments() -> argparse.Namespace:
    parser = results.parser("encode.py", __doc__.splitlines()[0], rounds=31)
    parser.add_argument(
        "--contexts", type=results.count, default=512, help="of 128 tokens, in the store they come from"
    )
    parser.add_argument("--tokens", type=results.count, default=32_768, help="a turn; 31 turns of these are a million")
    arguments = results.parse(parser)
    if arguments.quick:
        arguments.tokens, arguments.contexts = 2048, 32
    return arguments


if __name__ == "__main__":
    main()
