"""How well a diff of latents recovers what was planted: recall, power, coverage of intervals, calibration of tests.

Many models are planted, and of each many sets of prompts are drawn and diffed. The true mean change of a latent is
exactly 0 for nulls and for all others that of a set of prompts so large that its own error hardly matters. As many sets
are diffed with organisms that push nothing, where every discovery is a false one. Shares are ratios of sums over
everything that was diffed, with bootstrap intervals over models, which are independent; sets of prompts of one model
share its features and its truth.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from saetools.activations.stream import stream_activations
from saetools.data.conversation import Conversation
from saetools.data.roles import select_positions
from saetools.data.tokenizing import tokenize
from saetools.diff import LatentDiff, diff_latents
from saetools.errors import InputError, SaetoolsWarning
from saetools.planted.language import draw_prompts
from saetools.planted.model import PlantedConfig, PlantedModel, plant_model
from saetools.planted.weights import PLANTED_SITE
from saetools.stats import Estimate, estimate_mean, estimate_ratios

P_LEVELS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.5)
"""Levels at which p-values of nulls are counted."""
FDR_LEVELS = (0.01, 0.05, 0.1, 0.2)
"""Nominal false discovery rates."""
_POWER_LEVEL = 0.05
_COLUMNS = ("low", "high", "p_value", "q_value", "rank", "n_active")
_NULL, _NEIGHBOUR, _PERSONA, _CORRELATE = range(4)
_TRUTH_SEED = 0  # sets of prompts that are diffed have seeds from 1


@dataclass(frozen=True)
class RecoveryConfig:
    """How much is planted and diffed."""

    model: PlantedConfig = field(default_factory=PlantedConfig)
    """Settings of the models; their seed is that of the first, and the others follow."""
    n_models: int = 20
    """Planted models."""
    n_draws: int = 25
    """Sets of prompts of each."""
    n_prompts: int = 64
    """Prompts of a set."""
    n_truth: int = 8192
    """Prompts from which the true changes are known."""
    tops: tuple[int, ...] = (8, 16, 32, 64)
    """How many of the largest increases count as found."""

    def __post_init__(self) -> None:
        for name, least in (("n_models", 2), ("n_draws", 1), ("n_prompts", 2)):
            if getattr(self, name) < least:
                raise InputError(name, expected=f"{least} or more", received=getattr(self, name), remedy="raise it")
        if self.n_truth < 16 * self.n_prompts:
            raise InputError(
                "n_truth",
                expected=f"16 times the prompts of a set, {16 * self.n_prompts}, or more",
                received=self.n_truth,
                remedy="raise it: the truth has to be known better than what is measured against it",
            )


@dataclass(frozen=True)
class Detection:
    """How surely planted latents of one strength are found.

    Args:
        kind: `persona` or `correlate`.
        strength: the planted push.
        change: their true mean change of activation.
        recall: share that is among the n largest increases, by n.
        power: share that counts as changed at a false discovery rate of 5 %; latents that are not tested do not.
    """

    kind: str
    strength: float
    change: float
    recall: Mapping[int, Estimate]
    power: Estimate


@dataclass(frozen=True)
class Coverage:
    """How often 95 % intervals hold the true change.

    Latents that are inactive in a set have no interval there, nor do some that are active in very few conversations.

    Args:
        group: `planted`, `neighbour` or `null`.
        tested: latents with a p-value, or those active in too few conversations for one.
        determined: share of the active latents that have an interval.
        covered: share of intervals that hold the truth.
        below: share that lie below it.
        above: share that lie above it.
        n_intervals: counted.
    """

    group: str
    tested: bool
    determined: Estimate
    covered: Estimate
    below: Estimate
    above: Estimate
    n_intervals: int


@dataclass(frozen=True)
class Rejections:
    """Share of tested nulls with a p-value up to a level: the level itself if tests are calibrated."""

    level: float
    share: Estimate


@dataclass(frozen=True)
class FalseDiscoveries:
    """What counts as changed at a nominal false discovery rate.

    Args:
        level: nominal.
        realised: share of nulls among the latents that count as changed, averaged over sets; 0 for a set with none.
        promised: the level times the share of nulls among tested latents: what the procedure guarantees.
        n_found: latents that count as changed, a set.
    """

    level: float
    realised: Estimate
    promised: float
    n_found: float


@dataclass(frozen=True)
class CompleteNull:
    """What is found where the fine-tune changed no latent on average.

    Args:
        discovered: share of sets in which any latent counts as changed, by nominal false discovery rate: the rate
            itself or less if tests are calibrated.
        rejections: by level.
        n_tested: latents tested, a set.
    """

    discovered: Mapping[float, Estimate]
    rejections: tuple[Rejections, ...]
    n_tested: float


@dataclass(frozen=True)
class Recovery:
    """What `measure_recovery` found.

    Args:
        detections: by kind and strength.
        coverage: by group.
        rejections: by level.
        false_discoveries: by level.
        complete_null: where nothing is pushed.
        warned: share of diffs that warned that the SAE does not see the change well.
        config: settings.
    """

    detections: tuple[Detection, ...]
    coverage: tuple[Coverage, ...]
    rejections: tuple[Rejections, ...]
    false_discoveries: tuple[FalseDiscoveries, ...]
    complete_null: CompleteNull
    warned: float
    config: RecoveryConfig


def measure_recovery(
    config: RecoveryConfig = RecoveryConfig(), *, on_progress: Callable[[int, int], None] | None = None
) -> Recovery:
    """Plant models, diff sets of prompts of each, and compare with the truth.

    A diff of 64 prompts takes about 0.3 s on one core.

    Args:
        config: settings.
        on_progress: called with diffs done and in all.
    """
    truths: list[Tensor] = []
    found: list[Tensor] = []
    unpushed: list[Tensor] = []
    n_warned = done = 0
    for number in range(config.n_models):
        settings = dataclasses.replace(config.model, seed=config.model.seed + number)
        for pushed in (True, False):
            planted = plant_model(settings, pushed=pushed)
            columns = []
            for draw in range(1, config.n_draws + 1):
                diff = _diff(planted, draw_prompts(planted.language, config.n_prompts, seed=draw))
                own = [diff.table[name].fill_null(math.nan).to_torch().double() for name in _COLUMNS]
                columns.append(torch.stack(own))
                n_warned += bool(diff.warnings) and pushed
                done += 1
                if on_progress is not None:
                    on_progress(done, 2 * config.n_models * config.n_draws)
            (found if pushed else unpushed).append(torch.stack(columns, 1))
            if pushed:
                prompts = draw_prompts(planted.language, config.n_truth, seed=_TRUTH_SEED)
                truths.append(_truth(planted, true_changes(planted, prompts)))
    warned = n_warned / (config.n_models * config.n_draws)
    return summarise_recovery(torch.stack(truths), torch.stack(found, 1), torch.stack(unpushed, 1), warned, config)


def true_changes(planted: PlantedModel, conversations: Sequence[Conversation]) -> Float[Tensor, " latent"]:
    """Mean change of every latent on prompt tokens: exactly 0 for nulls, else its average over conversations.

    Computed apart from `diff_latents`.
    """
    tokenized = list(tokenize(conversations, planted.base.tokenizer))
    sides = []
    for lm in (planted.base, planted.tuned):
        totals = torch.zeros(planted.sae.d_sae, dtype=torch.double)
        for block in stream_activations(lm, [PLANTED_SITE], tokenized):
            chosen = select_positions(block.roles, "prompt")
            _, place, counts = torch.unique(block.documents[chosen], return_inverse=True, return_counts=True)
            acts = planted.sae.encode(block.acts[PLANTED_SITE][chosen]).to_dense().double()
            totals += (acts / counts[place][:, None]).sum(0)
        sides.append(totals / len(tokenized))
    change = (sides[1] - sides[0]).float()
    change[list(planted.nulls)] = 0.0
    return change


def _truth(planted: PlantedModel, change: Float[Tensor, " latent"]) -> Float[Tensor, "3 latent"]:
    """Change, group and strength of each latent."""
    group, strength = torch.full_like(change, _NEIGHBOUR), torch.zeros_like(change)
    group[list(planted.nulls)] = _NULL
    for kind, latents in ((_PERSONA, planted.persona), (_CORRELATE, planted.correlates)):
        group[list(latents)] = kind
        strength[list(latents)] = torch.tensor(planted.strengths)
    return torch.stack([change, group, strength])


def _diff(planted: PlantedModel, prompts: Sequence[Conversation]) -> LatentDiff:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaetoolsWarning)  # counted instead
        return diff_latents(planted.base, planted.tuned, planted.sae, prompts, positions="prompt")


def summarise_recovery(
    truth: Float[Tensor, "model 3 latent"],
    found: Float[Tensor, "column model draw latent"],
    unpushed: Float[Tensor, "column model draw latent"],
    warned: float,
    config: RecoveryConfig,
) -> Recovery:
    """Shares over all diffs, with intervals over models.

    Args:
        truth: change, group and strength of each latent.
        found: the columns `low`, `high`, `p_value`, `q_value`, `rank`, `n_active` of each diff; NaN where
            there is none.
        unpushed: the same of the organisms that push nothing.
        warned: share of diffs that warned.
        config: settings.
    """
    low, high, p, q, rank, n_active = found
    change, group, strength = truth[:, :, None].unbind(1)
    change, tested = change.double(), ~p.isnan()
    everywhere = torch.ones_like(tested)
    detections = []
    for kind, name in ((_PERSONA, "persona"), (_CORRELATE, "correlate")):
        for push in config.model.strengths:
            here = ((group == kind) & (strength == torch.tensor(push))) & everywhere
            recall = {n: _share(rank <= n, here) for n in config.tops}
            mean_change = float(change.expand(here.shape)[here].mean())
            detections.append(Detection(name, push, mean_change, recall, _share(q <= _POWER_LEVEL, here)))
    coverage = []
    for name, kinds in (("planted", (_PERSONA, _CORRELATE)), ("neighbour", (_NEIGHBOUR,)), ("null", (_NULL,))):
        for with_p in (True, False):
            active = torch.isin(group, torch.tensor(kinds)) & (n_active > 0) & (tested == with_p)
            here = active & ~low.isnan()
            if bool(here.any()):
                below, above = high < change, low > change
                covered, under, over = (_share(hits, here) for hits in (~(below | above), below, above))
                determined = _share(here, active)
                coverage.append(Coverage(name, with_p, determined, covered, under, over, int(here.sum())))
    nulls = (group == _NULL) & tested
    null_share = float(nulls.sum() / tested.sum())
    return Recovery(
        detections=tuple(detections),
        coverage=tuple(coverage),
        rejections=_rejections(p, nulls),
        false_discoveries=tuple(
            FalseDiscoveries(
                level,
                _mean(((q <= level) & nulls).sum(2) / (q <= level).sum(2).clamp_min(1)),
                level * null_share,
                float((q <= level).sum(2).double().mean()),
            )
            for level in FDR_LEVELS
        ),
        complete_null=_complete_null(*unpushed[[_COLUMNS.index("p_value"), _COLUMNS.index("q_value")]]),
        warned=warned,
        config=config,
    )


def _complete_null(p: Float[Tensor, "model draw latent"], q: Float[Tensor, "model draw latent"]) -> CompleteNull:
    tested = ~p.isnan()
    return CompleteNull(
        discovered={level: _mean((q <= level).any(2)) for level in FDR_LEVELS},
        rejections=_rejections(p, tested),
        n_tested=float(tested.sum(2).double().mean()),
    )


def _rejections(
    p: Float[Tensor, "model draw latent"], nulls: Bool[Tensor, "model draw latent"]
) -> tuple[Rejections, ...]:
    return tuple(Rejections(level, _share(p <= level, nulls)) for level in P_LEVELS)


def _share(hits: Bool[Tensor, "model draw latent"], among: Bool[Tensor, "model draw latent"]) -> Estimate:
    """Share of hits over models that have any; comparisons with NaN are none."""
    above, below = ((mask & among).sum((1, 2)).double() for mask in (hits, among))
    there = below > 0
    return estimate_ratios(above[there][:, None], below[there][:, None])[0]


def _mean(values: Shaped[Tensor, "model draw"]) -> Estimate:
    return estimate_mean(values.double().mean(1))
