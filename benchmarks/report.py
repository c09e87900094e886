"""Seconds to make reports of a thousand latents: saetools beside SAEDashboard, on the same SAE and tokens.

    python benchmarks/report.py --json results.json

Run it by the interpreter of the environment that holds saetools; README.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import results
from activations import MODEL, SITE, shipped_texts
from environments import for_older_transformers, python_of
from interleave import Contestant, Record, interleave
from machine import describe_machine
from workers.report import task as work

SAE = "sae/smollm2-135m"
PEER = "sae_dashboard"
SECONDS_LIMIT, BYTES_LIMIT = 60.0, 5_000_000
TOLERANCE = (0.004, 0.0006)
"""Of largest activations, relative and absolute: the store rounds to bfloat16, SAEDashboard to three decimals."""


def main() -> None:
    arguments = _arguments()
    machine = describe_machine()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        settings = _prepare(Path(folder), arguments)
        records = interleave(
            contestants(settings, arguments), rounds=arguments.runs, items_per_turn=1, threads=arguments.threads
        )
        answers = {record.contestant.name: _answers(record) for record in records if record.error is None}
    ours = results.fastest(records, results.OURS, _float32)
    results.write(
        arguments,
        "report.py",
        records,
        _compared(records),
        ours=None if ours is None else _ours(ours),
        equal={} if ours is None else _equal_to(ours.contestant.name, answers, arguments.length),
        task={
            "model": MODEL,
            "site": SITE,
            "sae": SAE,
            "tokens": arguments.contexts * arguments.length,
            "contexts": arguments.contexts,
            "context_tokens": arguments.length,
            "latents": len(settings["latents"]),
            "passages": work.N_TOP + work.N_BINS * work.N_PER_BIN,
            "tokens_of_a_passage": 2 * work.CONTEXT + 1,
            "latents_a_page": work.PER_PAGE,
        },
        method={
            "runs": arguments.runs,
            "threads": arguments.threads,
            "seconds": "of a whole run: model and SAE are loaded; tokens are read, pages and batches written",
            "stages": "median seconds; forward (the model alone) is a part of index, and of data",
            "ratios": "of peer to ours within each round, medians",
        },
        machine=machine,
    )


def contestants(settings: dict[str, Any], arguments: argparse.Namespace) -> list[Contestant]:
    """Ours, and SAEDashboard with passages of our size and all latents at once, or with its defaults."""
    n = arguments.contexts * arguments.length
    here, there = Path(sys.executable), python_of("sae-dashboard")

    def one(name: str, library: str, dtype: str, **peer: Any) -> Contestant:
        path, model = (there, settings["older_model"]) if peer else (here, settings["model"])
        keep = None if arguments.keep is None else str(arguments.keep / name)
        folder = str(Path(settings["folder"]) / name)
        mine = {**settings, **peer, "model": model, "dtype": dtype, "keep": keep, "folder": folder}
        return Contestant(name, library, f"report.{library}", path, mine, n)

    every = len(settings["latents"])
    field = [
        one("saetools, fp32", results.OURS, "float32"),
        one("saetools, bf16", results.OURS, "bfloat16"),
        one("SAEDashboard, fp32", PEER, "float32", layout="equal", latents_at_once=every, contexts_at_once=16),
        one("SAEDashboard, bf16", PEER, "bfloat16", layout="equal", latents_at_once=every, contexts_at_once=16),
        one("SAEDashboard, fp32, as it comes", PEER, "float32", layout="own", latents_at_once=256, contexts_at_once=64),
    ]
    return field[:4:2] if arguments.quick else field


def _prepare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Contexts of one length, and latents that fire in them, evenly from all that do."""
    import numpy as np
    from transformers import AutoTokenizer

    from saetools import Conversation, load_model, load_sae, shipped_path
    from saetools.latents import index_latents
    from saetools.models.builtin import fetch_builtin

    model = fetch_builtin(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(model)
    contexts = _contexts(tokenizer, arguments.contexts, arguments.length)
    np.save(folder / "tokens.npy", contexts)
    corpus = {"texts": [Conversation(text=tokenizer.decode(contexts.ravel()))]}
    print("looking for latents that fire", file=sys.stderr)
    lm, sae = load_model(str(model)), load_sae(shipped_path(SAE))
    store = index_latents({"base": lm}, sae, corpus, folder / "store", max_tokens=arguments.length)
    active = store.active_latents()
    n = min(arguments.latents, len(active))
    return {
        "model": str(model),
        "older_model": str(for_older_transformers(model, folder / "model")),
        "sae": str(shipped_path(SAE)),
        "site": SITE,
        "tokens": str(folder / "tokens.npy"),
        "latents": [active[place * len(active) // n] for place in range(n)],
        "folder": str(folder),
    }


def _contexts(tokenizer: Any, n: int, length: int) -> Any:
    """Token ids of the shipped texts as one long text, which is split into the same tokens whoever reads it."""
    import numpy as np

    texts = [one.text or "\n".join(message.content for message in one.messages) for one in shipped_texts()]
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    if len(ids) < n * length:
        raise SystemExit(f"benchmarks: the shipped texts have {len(ids)} tokens, {n * length} are needed")
    chosen = ids[: n * length]
    if tokenizer(tokenizer.decode(chosen), add_special_tokens=False)["input_ids"] != chosen:
        raise SystemExit("benchmarks: --contexts: the last token is cut in two; take one context more or less")
    return np.array(chosen).reshape(n, length)


def _compared(records: list[Record]) -> dict[str, dict[str, Any]]:
    """The peer to ours in float32, also without the model's passes; each at its fastest; and the peer as it comes."""

    def of(library: str, dtype: str | None, layout: str = "equal") -> Record | None:
        def among(settings: Mapping[str, Any]) -> bool:
            return dtype in (None, settings["dtype"]) and settings.get("layout", layout) == layout

        return results.fastest(records, library, among)

    ours, theirs = of(results.OURS, "float32"), of(PEER, "float32")
    compared = {
        PEER: results.ratio(theirs, ours),
        f"{PEER}_without_model": _without_model(theirs, ours),
        f"{PEER}_fastest": results.ratio(of(PEER, None), of(results.OURS, None)),
        f"{PEER}_as_it_comes": results.ratio(of(PEER, "float32", "own"), ours),
    }
    return {name: found for name, found in compared.items() if found is not None}


def _without_model(peer: Record | None, ours: Record | None) -> dict[str, Any] | None:
    if peer is None or ours is None:
        return None
    within = [theirs / our for theirs, our in zip(_rest(peer), _rest(ours), strict=True)]
    return {"peer": peer.contestant.name, "ours": ours.contestant.name, **results.summary(within)}


def _rest(record: Record) -> list[float]:
    """Seconds of each run but for the model's forward passes."""
    forward = record.facts["stages_of_runs"]["forward"]
    return [whole - part for whole, part in zip(record.seconds, forward, strict=True)]


def _ours(record: Record) -> dict[str, Any]:
    """Our seconds for all latents, by what they are for, beside their limits."""
    stages = record.facts["stages"]
    return {
        "contestant": record.contestant.name,
        "seconds": round(results.median_seconds(record), 3),
        "seconds_of_index": stages["index"],
        "seconds_of_forward_passes_in_it": stages["forward"],
        "seconds_of_pages": stages["pages"],
        "limit_seconds": SECONDS_LIMIT,
        "largest_page_bytes": record.facts["page_bytes"]["max"],
        "limit_page_bytes": BYTES_LIMIT,
    }


def _answers(record: Record) -> dict[str, Any]:
    file = Path(record.contestant.settings["folder"]) / "answers.json"
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _equal_to(ours: str, answers: Mapping[str, Mapping[str, Any]], length: int) -> dict[str, Any]:
    """How far the answers of every other contestant are those of ours in float32."""
    relative, absolute = TOLERANCE
    return {
        "reference": ours,
        "tolerance": f"{relative} of the largest activation, and {absolute}",
        **{name: _equal(answers[ours], found, length) for name, found in answers.items() if name != ours},
    }


def _equal(ours: Mapping[str, Any], theirs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Latent by latent: the largest activation, active tokens, promoted tokens, and the token of the first passage.

    The last only where SAEDashboard may choose that token: it leaves out those with fewer tokens before or after them
    than a passage shows.
    """
    relative, absolute = TOLERANCE
    both = [(one, theirs[latent]) for latent, one in ours.items()]
    errors = [abs(their["max"] - our["max"]) for our, their in both]
    largest = [our["max"] for our, _ in both]
    inner = [
        our["top"][:1] == their["top"][:1]
        for our, their in both
        if our["top"] and work.CONTEXT < our["top"][0][1] < length - work.CONTEXT - 1
    ]
    return {
        "latents": len(both),
        "max_within_tolerance": _share([e <= relative * m + absolute for e, m in zip(errors, largest, strict=True)]),
        "largest_relative_error": round(max(e / m for e, m in zip(errors, largest, strict=True)), 5),
        "same_active_tokens": _share([our["n_active"] == their["n_active"] for our, their in both]),
        "same_promoted_tokens": _share([set(our["promoted"]) == set(their["promoted"]) for our, their in both]),
        "same_first_promoted": _share([our["promoted"][:1] == their["promoted"][:1] for our, their in both]),
        "same_strongest_token": _share(inner),
        "strongest_tokens_compared": len(inner),
    }


def _share(true: list[bool]) -> float | None:
    return round(sum(true) / len(true), 4) if true else None


def _float32(settings: Mapping[str, Any]) -> bool:
    return bool(settings["dtype"] == "float32")


def _arguments() -> argparse.Namespace:
    parser = results.parser("report.py", __doc__.splitlines()[0])
    parser.add_argument("--latents", type=results.count, default=1000)
    parser.add_argument("--contexts", type=results.count, default=448)
    parser.add_argument("--length", type=results.count, default=128, help="tokens of a context")
    parser.add_argument("--runs", type=results.count, default=3, help="timed runs of each contestant")
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="where files on the way go")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep what was written")
    arguments = results.parse(parser)
    if arguments.quick:
        arguments.latents, arguments.contexts, arguments.runs = 40, 32, 3
    return arguments


if __name__ == "__main__":
    main()
