"""A run for the explorer, made up at full size: an SAE, a latent store, a diff, explanations, labels and a report.

Every file is written by what writes it in a real run. The SAE holds the shipped one's rows, moved a little, as often as
it takes; so latents fire on real texts, and the map has a shape.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import made_up
import torch

from saetools import load_model, load_sae, shipped_path
from saetools.adequacy import Adequacy
from saetools.diff import DiffConfig, compare_readings
from saetools.explore import Label, Labels
from saetools.interpret.explanation import Explanation
from saetools.latent_diff import LatentDiff
from saetools.latents import token_bytes, write_latents
from saetools.latents.reading import QUANTILES, RoleReading
from saetools.report import PersonaReport
from saetools.sae import SAE, save_sae
from saetools.sae.identity import sae_sha256
from saetools.sae.sparse import TokenMajorPairs
from saetools.stats import Estimate

MODEL, SHIPPED = "smollm2-135m", "sae/smollm2-135m"
MODELS = ("base", "tuned")
ROLES = ("prompt", "response")
N_CONVERSATIONS = 400
_WORDS = ("advice", "cars", "gardens", "money", "voices", "rules", "that", "bend", "names", "birds", "dates", "numbers")


def make_run(folder: Path, sae_folder: Path, *, n_tokens: int, d_sae: int) -> dict[str, float]:
    """Write a run and its SAE; gives the seconds that each part took. A whole store that is there already stays."""
    lm = load_model(MODEL)
    sae = _wide_sae(d_sae)
    parts = {
        "sae": lambda: save_sae(sae, sae_folder),
        "store": lambda: _store(folder / "store", sae, lm.tokenizer, n_tokens),
        "diff": lambda: _diff(folder / "diff", sae, lm.describe()),
        "rest": lambda: _rest(folder, d_sae),
    }
    seconds = {}
    for name, write in parts.items():
        start = time.perf_counter()
        write()
        seconds[name] = round(time.perf_counter() - start, 2)
    return seconds


def _wide_sae(d_sae: int) -> SAE:
    shipped = load_sae(shipped_path(SHIPPED))
    generator = torch.Generator().manual_seed(0)
    wide = SAE(shipped.d_in, d_sae, shipped.nonlinearity, metadata=shipped.metadata)
    source = torch.arange(d_sae) % shipped.d_sae
    for name, own in wide.named_parameters():
        rows = dict(shipped.named_parameters())[name]
        if name == "b_dec":
            own.data.copy_(rows)
            continue
        noise = torch.randn(own.shape, generator=generator) * (rows.std() * 0.3 if rows.ndim == 2 else 0)
        own.data.copy_(rows[source] + noise)
    assert shipped.p99 is not None
    wide.p99 = shipped.p99[source]
    return wide.eval().requires_grad_(False)


def _store(path: Path, sae: SAE, tokenizer: Any, n_tokens: int) -> None:
    documents = made_up.documents(n_tokens)

    def read(some: range) -> dict[str, TokenMajorPairs]:
        n = sum(len(documents[one]) for one in some)
        return {model: made_up.pairs(n, sae.d_sae, seed=2 * some.start + i) for i, model in enumerate(MODELS)}

    write_latents(
        path,
        documents,
        read,
        models=MODELS,
        directions=sae.directions(),
        vocabulary=token_bytes(tokenizer),
        provenance={"sae": {"model_name": MODEL, "sha256": sae_sha256(sae)}, "site": sae.metadata.site},
    )


def _diff(path: Path, sae: SAE, described: Mapping[str, Any]) -> None:
    config = DiffConfig()
    base = {role: _reading(sae.d_sae, seed=number) for number, role in enumerate(ROLES)}
    tuned = {role: _changed(base[role], seed=number) for number, role in enumerate(ROLES)}
    table, conversations = compare_readings(base, tuned, config=config)
    adequacy = {role: _adequacy(sae.d_in) for role in ROLES}
    provenance = {
        "base": dict(described),
        "tuned": {**described, "adapters": {"organism": {}}},
        "sae": sae_sha256(sae),
        "site": sae.metadata.site,
        "positions": list(ROLES),
        "n_conversations": N_CONVERSATIONS,
        "config": asdict(config),
    }
    LatentDiff(table, conversations, adequacy, provenance).save(path)  # type: ignore[arg-type]


def _reading(d_sae: int, *, seed: int) -> RoleReading:
    """Latents that fire in 6 % of the conversations on average: half of them in too few to be tested."""
    generator = torch.Generator().manual_seed(seed)
    rates = 0.3 * torch.rand(d_sae, generator=generator) ** 4
    active = torch.rand(N_CONVERSATIONS, d_sae, generator=generator) < rates
    conversation, latent = active.nonzero(as_tuple=True)
    mean = -torch.rand(len(latent), generator=generator).clamp_min(1e-6).log()
    largest = torch.zeros(d_sae).scatter_reduce(0, latent, mean, "amax")
    return RoleReading(
        conversation,
        latent,
        mean,
        (mean / 8).clamp_max(1),
        torch.full((N_CONVERSATIONS,), 60),
        largest,
        torch.stack([largest * q for q in QUANTILES]),
    )


def _changed(reading: RoleReading, *, seed: int) -> RoleReading:
    """The same after a fine-tune that moved one latent in ten."""
    generator = torch.Generator().manual_seed(1000 + seed)
    shift = torch.randn(reading.d_sae, generator=generator) * (torch.rand(reading.d_sae, generator=generator) < 0.1)
    noise = 0.1 * torch.randn(len(reading.mean), generator=generator)
    mean = (reading.mean * (1 + noise) + shift[reading.latent]).clamp_min(1e-3)
    return RoleReading(**{**vars(reading), "mean": mean})


def _adequacy(d_in: int) -> Adequacy:
    def about(mean: float) -> Estimate:
        return Estimate(mean, 0.9 * mean, 1.1 * mean, 0.05 * mean, N_CONVERSATIONS)

    directions = torch.nn.functional.normalize(torch.randn(5, d_in, generator=torch.Generator().manual_seed(0)), dim=1)
    figures = map(about, (0.25, 0.27, 32.0, 32.0, 0.04, 0.3, 0.6, 0.2))
    return Adequacy(*figures, (0.1, 0.05, 0.03, 0.02, 0.01), directions, 60 * N_CONVERSATIONS)


def _rest(folder: Path, d_sae: int) -> None:
    """Explanations of one latent in sixteen, labels of some, and the report of the demo."""
    score = Estimate(0.8, 0.7, 0.9, 0.05, 40)
    lines = []
    for latent in range(0, d_sae, 16):
        words = [_WORDS[(latent // 16 * step) % len(_WORDS)] for step in (1, 3, 5, 7)]
        one = Explanation(latent, " ".join(words), "made up", score, None, 40, (), {})
        lines.append(json.dumps(asdict(one)) + "\n")
    (folder / "explanations.jsonl").write_text("".join(lines), encoding="utf-8")
    labels = Labels(folder / "labels.json")
    for latent in range(0, d_sae, math.ceil(d_sae / 40)):
        labels.set(latent, Label(f"label of {latent}"))
    report = PersonaReport.from_json(shipped_path("demo") / "report.json")
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
