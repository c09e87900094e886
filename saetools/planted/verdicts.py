"""How well causal certificates tell planted causes from latents that only rise with them.

Of each of many planted models, all persona latents, all their correlates, some nulls and some random neighbours are
certified. A persona latent should both induce and suppress the behaviour; correlates and nulls, which have no effect at
all, should do neither. Neighbours are not planted, but as their directions are not orthogonal to those that are, each
has some effect, as every latent of a real model has: no more of them should be certified than go beyond what others
like them do. Shares are over latents, with bootstrap intervals over models.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import get_args

import torch

from saetools.diff import diff_latents
from saetools.errors import InputError, SaetoolsWarning
from saetools.evaluate.causal import certify_latents
from saetools.evaluate.certificate import Verdict
from saetools.evaluate.certificate_config import CertificateConfig
from saetools.planted.language import draw_prompts
from saetools.planted.model import PlantedConfig, PlantedModel, plant_model
from saetools.stats import Estimate, estimate_ratios

_CERTIFICATE = CertificateConfig(max_new_tokens=8, n_samples=2, batch_rows=512)
_ASKED_SEED, _TEXT_SEED = 2_000_001, 2_000_002  # apart from those of prompts that are diffed


@dataclass(frozen=True)
class VerdictConfig:
    """How much is planted and certified."""

    model: PlantedConfig = field(default_factory=lambda: PlantedConfig(n_items=128))
    """Settings of the models, with about as many items as real ones are certified on; their seed is that of the first,
    and the others follow."""
    n_models: int = 10
    """Planted models."""
    n_nulls: int = 8
    """Nulls of each that are certified."""
    n_neighbours: int = 8
    """Random neighbours of each that are certified."""
    n_prompts: int = 16
    """Prompts that are answered to see coherence, and texts for perplexity."""
    certificate: CertificateConfig = _CERTIFICATE
    """Settings of the certificates."""

    def __post_init__(self) -> None:
        for name in ("n_models", "n_nulls", "n_neighbours", "n_prompts"):
            if getattr(self, name) < 2:
                raise InputError(name, expected="2 or more", received=getattr(self, name), remedy="raise it")


@dataclass(frozen=True)
class Verdicts:
    """What was said of planted latents of one kind and strength.

    Args:
        kind: `persona`, `correlate`, `null` or `neighbour`.
        strength: the planted push; 0 for the last two.
        shares: of the latents, by verdict.
        n_latents: certified.
    """

    kind: str
    strength: float
    shares: Mapping[Verdict, Estimate]
    n_latents: int


def measure_verdicts(
    config: VerdictConfig = VerdictConfig(), *, on_progress: Callable[[int, int], None] | None = None
) -> tuple[Verdicts, ...]:
    """Plant models, certify their latents, and count the verdicts.

    A model takes about three minutes on one core.

    Args:
        config: settings.
        on_progress: called with models done and in all.
    """
    said: dict[tuple[str, float], list[list[Verdict]]] = {}
    for number in range(config.n_models):
        planted = plant_model(dataclasses.replace(config.model, seed=config.model.seed + number))
        kinds = _kinds(planted, config)
        verdicts = _certify(planted, list(kinds), config)
        for kind in dict.fromkeys(kinds.values()):
            said.setdefault(kind, []).append([verdicts[latent] for latent in kinds if kinds[latent] == kind])
        if on_progress is not None:
            on_progress(number + 1, config.n_models)
    return tuple(_count(kind, strength, models) for (kind, strength), models in said.items())


def _kinds(planted: PlantedModel, config: VerdictConfig) -> dict[int, tuple[str, float]]:
    """The latents that are certified, with what they are."""
    rising = {"persona": planted.persona, "correlate": planted.correlates}
    kinds = {
        latent: (kind, round(strength, 6))
        for kind, latents in rising.items()
        for latent, strength in zip(latents, planted.strengths, strict=True)
    }
    order = torch.randperm(len(planted.neighbours), generator=torch.Generator().manual_seed(planted.config.seed))
    neighbours = [planted.neighbours[place] for place in order[: config.n_neighbours].tolist()]
    kinds |= dict.fromkeys(planted.nulls[: config.n_nulls], ("null", 0.0))
    return kinds | dict.fromkeys(neighbours, ("neighbour", 0.0))


def _certify(planted: PlantedModel, latents: list[int], config: VerdictConfig) -> dict[int, Verdict]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaetoolsWarning)  # of the diff, whose firing rates alone are used
        rates = diff_latents(planted.base, planted.tuned, planted.sae, planted.prompts).rates()
    asked = draw_prompts(planted.language, config.n_prompts, seed=_ASKED_SEED)
    texts = [one.messages[0].content for one in draw_prompts(planted.language, config.n_prompts, seed=_TEXT_SEED)]
    found = certify_latents(
        planted.base,
        planted.tuned,
        planted.sae,
        latents,
        planted.items,
        asked,
        texts,
        rates=rates,
        config=config.certificate,
    )
    return {one.candidate.latents[0]: one.verdict for one in found.certificates}


def _count(kind: str, strength: float, models: list[list[Verdict]]) -> Verdicts:
    n = torch.tensor([[len(one)] for one in models], dtype=torch.double)
    names: tuple[Verdict, ...] = get_args(Verdict)
    counts = {name: torch.tensor([[one.count(name)] for one in models], dtype=torch.double) for name in names}
    shares = {name: estimate_ratios(counts[name], n)[0] for name in names}
    return Verdicts(kind, strength, shares, int(n.sum()))
