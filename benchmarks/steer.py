"""Seconds to answer a batch of prompts under an edit on a CPU: saetools, peers, and Hugging Face without an edit.

    python benchmarks/steer.py --json results.json

Run it by the interpreter of the environment that holds saetools; README.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import results
from activations import MODEL, SITE
from environments import for_older_transformers, python_of
from interleave import Contestant, Record, interleave
from machine import describe_machine

SAE = "sae/smollm2-135m"
LAYER = int(SITE.split(".")[1])
STRENGTHS = tuple(round(0.25 * step, 2) for step in range(1, 10))  # of the edit; nine
N_LATENTS = 10
_SEED = 0


def main() -> None:
    arguments = _arguments()
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        task = _prepare(Path(folder), arguments)
        records = interleave(
            contestants(task, arguments), rounds=arguments.rounds, items_per_turn=1, threads=arguments.threads
        )
        sweeps = interleave(
            sweep_contestants(task, arguments),
            rounds=arguments.sweep_rounds,
            items_per_turn=1,
            threads=arguments.threads,
        )
    results.write(
        arguments,
        "steer.py",
        [*records, *sweeps],
        _compared(records) | _sweeps_compared(sweeps),
        equal=_equal(records),
        sweeps_equal=_sweeps_equal(sweeps),
        shape={"model": MODEL, "site": SITE, "batch": arguments.batch, "new_tokens": arguments.new_tokens}
        | {"prompt_tokens": task["prompt_tokens"], "sae": SAE, "latents": N_LATENTS, "strengths": STRENGTHS},
        method={
            "rounds": arguments.rounds,
            "sweep_rounds": arguments.sweep_rounds,
            "threads": arguments.threads,
            "seconds": "of one batch of answers; of a sweep, all strengths",
            "ratios": "of peer to ours within each round, medians",
            "equal": "whether all tokens, to where an answer ends, are the bare hook's in this version of transformers",
        },
        machine=machine,
    )


def contestants(task: dict[str, Any], arguments: argparse.Namespace) -> list[Contestant]:
    """Every library with every edit that it offers."""
    here = Path(sys.executable)
    n = arguments.batch * arguments.new_tokens

    def one(name: str, library: str, module: str, edit: str, peer: str | None = None) -> Contestant:
        # Peers that need another version of transformers read the same weights with a config that it understands.
        older = peer in ("repeng", "steering-vectors")
        settings = {**task, "edit": edit, "reference": task["references"][edit], "batch": arguments.batch}
        settings |= {"values": task["clamped"]} | ({"model": task["older_model"]} if older else {})
        return Contestant(name, library, f"steer.{module}", here if peer is None else python_of(peer), settings, n)

    field = [
        one("Hugging Face, no edit", "hf_generate", "hf", "plain"),
        one("bare hook, direction", "bare_hook_direction", "hf", "direction"),
        one("bare hook, clamp", "bare_hook_clamp", "hf", "clamp"),
        one("saetools, direction", "saetools_direction", "saetools", "direction"),
        one("saetools, clamp", "saetools_clamp", "saetools", "clamp"),
        one("saetools generate, no edit", "saetools_generate_plain", "saetools_generate", "plain"),
        one("saetools generate, direction", "saetools_generate_direction", "saetools_generate", "direction"),
        one("saetools generate, clamp", "saetools_generate_clamp", "saetools_generate", "clamp"),
        one("SAELens, direction", "sae_lens_direction", "sae_lens", "direction"),
        one("SAELens, clamp", "sae_lens_clamp", "sae_lens", "clamp"),
        one("nnsight, direction", "nnsight_direction", "nnsight", "direction", "nnsight"),
        one("nnsight, clamp", "nnsight_clamp", "nnsight", "clamp", "nnsight"),
        one("repeng, direction", "repeng_direction", "repeng", "direction", "repeng"),
        one("Hugging Face of repeng, no edit", "hf_generate_repeng", "hf", "plain", "repeng"),
        one(
            "steering-vectors, direction",
            "steering_vectors_direction",
            "steering_vectors",
            "direction",
            "steering-vectors",
        ),
        one(
            "Hugging Face of steering-vectors, no edit",
            "hf_generate_steering_vectors",
            "hf",
            "plain",
            "steering-vectors",
        ),
    ]
    return field[:5] if arguments.quick else field


def sweep_contestants(task: dict[str, Any], arguments: argparse.Namespace) -> list[Contestant]:
    """All strengths of an edit at once, and one after the other, with ours and with Hugging Face's `generate`."""
    return [
        Contestant(
            f"{edit}, batch {batch}, {how}",
            f"{edit}_{batch}_{how.replace(' ', '_')}",
            "steer.sweep",
            Path(sys.executable),
            {**task, "edit": edit, "reference": task["references"][edit], "batch": batch, "how": how}
            | {"values": task["clamped"], "strengths": STRENGTHS},
            len(STRENGTHS) * batch * arguments.new_tokens,
        )
        for edit in (("direction",) if arguments.quick else ("direction", "clamp"))
        for batch in ((1,) if arguments.quick else (1, 2, 8))
        for how in ("together", "one by one", "Hugging Face, one by one")
    ]


def _prepare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prompts of one length, the edits, and the answers of the bare hook."""
    import numpy as np
    import torch
    from workers.steer.task import Hook, Task

    from saetools import Conversation, load_advice, load_free_form, load_model, load_sae, shipped_path
    from saetools.decoding import end_tokens
    from saetools.generation import tokenize_prompts
    from saetools.models.builtin import fetch_builtin

    model = fetch_builtin(MODEL)
    lm, sae = load_model(str(model)), load_sae(shipped_path(SAE))
    questions = [one.question for one in load_free_form()] + [one.question for one in load_advice()]
    tokenized = tokenize_prompts(lm, [Conversation.chat(question) for question in questions])
    length, n = Counter(map(len, tokenized)).most_common(1)[0]
    chosen = [number for number, one in enumerate(tokenized) if len(one) == length][: arguments.batch]
    if n < arguments.batch:
        raise SystemExit(f"benchmarks: --batch: expected at most {n}, the prompts of one length")
    generator = torch.Generator().manual_seed(_SEED)
    direction = torch.nn.functional.normalize(torch.randn(lm.d_model, generator=generator), dim=0)
    assert sae.p99 is not None
    latents = sae.p99.topk(1000).indices[torch.randperm(1000, generator=generator)[:N_LATENTS]].sort().values
    np.save(folder / "prompts.npy", torch.stack([tokenized[number].token_ids for number in chosen]).numpy())
    np.save(folder / "vector.npy", (0.2 * sae.metadata.median_norm * direction).numpy())
    task = {
        "model": str(model),
        "older_model": str(for_older_transformers(model, folder / "model")),
        "layer": LAYER,
        "n_new": arguments.new_tokens,
        "end_tokens": sorted(end_tokens(lm)),
        "prompt_tokens": length,
        "prompts": str(folder / "prompts.npy"),
        "questions": [questions[number] for number in chosen],
        "vector": str(folder / "vector.npy"),
        "sae": str(shipped_path(SAE)),
        "k": json.loads((shipped_path(SAE) / "cfg.json").read_text(encoding="utf-8"))["k"],
        "latents": latents.tolist(),
        "clamped": (0.5 * sae.p99[latents]).tolist(),
        "references": {edit: str(folder / f"{edit}.npy") for edit in ("plain", "direction", "clamp")},
    }
    for edit, path in task["references"].items():
        one = Task({**task, "edit": edit, "values": task["clamped"], "batch": arguments.batch, "n_items": 1})
        plain = one.model()
        if edit != "plain":
            plain.model.layers[LAYER].register_forward_hook(Hook(one))
        with torch.inference_mode():
            np.save(path, plain.generate(one.token_ids, **one.options()).numpy())
    return task


def _compared(records: list[Record]) -> dict[str, dict[str, Any]]:
    """Each library to ours with the same edit; to Hugging Face without one, at our faster way."""
    compared: dict[str, dict[str, Any] | None] = {}
    plain = results.fastest(records, "hf_generate")
    for edit in ("direction", "clamp"):
        model, own = (results.fastest(records, f"saetools{way}_{edit}") for way in ("", "_generate"))
        compared[f"hf_generate_{edit}"] = results.ratio(plain, model)
        compared[f"hf_generate_{edit}_own_loop"] = results.ratio(plain, own)
        for peer in ("bare_hook", "sae_lens", "nnsight", "repeng", "steering_vectors"):
            compared[f"{peer}_{edit}"] = results.ratio(results.fastest(records, f"{peer}_{edit}"), model)
    compared["hf_generate"] = min(
        (found for edit in ("direction", "clamp") if (found := compared[f"hf_generate_{edit}"]) is not None),
        key=lambda found: found["median"],
        default=None,
    )
    compared["hf_generate_own_loop"] = results.ratio(plain, results.fastest(records, "saetools_generate_plain"))
    return {name: found for name, found in compared.items() if found is not None}


def _sweeps_compared(records: list[Record]) -> dict[str, dict[str, Any]]:
    """Nine runs to one sweep, each way of nine runs."""
    compared: dict[str, dict[str, Any] | None] = {}
    by_name = {record.contestant.library: record for record in records if record.error is None}
    for name, record in by_name.items():
        start, _, how = name.partition("_together")
        if how or not name.endswith("_together"):
            continue
        for kind in ("one_by_one", "Hugging_Face,_one_by_one"):
            label = "sweep_" + start + ("_hf" if kind.startswith("Hugging") else "")
            compared[label] = results.ratio(by_name.get(f"{start}_{kind}"), record)
    found = {name: one for name, one in compared.items() if one is not None}
    if found:
        found["sweep"] = min(found.values(), key=lambda one: one["median"])
    return found


def _equal(records: list[Record]) -> dict[str, dict[str, Any]]:
    """Per contestant, whether its answers are those of the bare hook."""
    return {
        record.contestant.name: {
            key: record.facts[key] for key in ("equal", "equal_tokens", "n_tokens") if key in record.facts
        }
        for record in records
        if record.error is None
    }


def _sweeps_equal(records: list[Record]) -> dict[str, float]:
    """Share of the answers of a sweep that are those of edits run one by one."""
    found = {}
    by_name = {record.contestant.library: record for record in records if record.error is None}
    for name, record in by_name.items():
        if name.endswith("_together") and (alone := by_name.get(name.removesuffix("together") + "one_by_one")):
            ours, theirs = record.facts["answers"], alone.facts["answers"]
            found[name] = sum(ours[key] == theirs[key] for key in theirs) / len(theirs)
    for record in records:
        record.facts.pop("answers", None)
    return found


def _arguments() -> argparse.Namespace:
    parser = results.parser("steer.py", __doc__.splitlines()[0], rounds=9)
    parser.add_argument("--batch", type=results.count, default=8)
    parser.add_argument("--new-tokens", type=results.count, default=48)
    parser.add_argument("--sweep-rounds", type=results.count, default=7)
    arguments = results.parse(parser)
    if arguments.quick:
        arguments.batch, arguments.new_tokens, arguments.sweep_rounds = 2, 8, 3
    return arguments


if __name__ == "__main__":
    main()
