"""Measuring both models under pushes along candidates: answers, scores, perplexity, controls; each kept once made."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.data.conversation import Conversation
from saetools.data.shipped import ForcedChoiceItem
from saetools.evaluate.cells import Cells
from saetools.evaluate.certificate import AGAINST, Against, Candidate, DosedAnswers, Effect
from saetools.evaluate.certificate_config import CertificateConfig
from saetools.evaluate.coherence import (
    AnswerCoherence,
    CoherenceLimits,
    Judge,
    largest_coherent,
    measure_coherence,
)
from saetools.evaluate.controls import PerplexityCurve, RandomPush, matched_latents, random_directions
from saetools.evaluate.forced_choice import rows_of_items, score_forced_choice
from saetools.evaluate.judge import described_judge
from saetools.evaluate.perplexity import measure_perplexity
from saetools.generation import SamplingConfig, generate
from saetools.models.language_model import LanguageModel
from saetools.models.replay import LayerReplay
from saetools.models.site import Site
from saetools.models.where import Edit
from saetools.provenance import sha256_of_texts, versions
from saetools.sae.identity import sae_sha256
from saetools.sae.model import SAE
from saetools.significance import draw_p_value, mean_p_values
from saetools.stats import Estimate, estimate_mean, estimate_ratios
from saetools.steer.directions import add_direction
from saetools.steer.latents import add
from saetools.steer.numbers import median_norm
from saetools.steer.scope import Scope

Side = Literal["base", "tuned"]
SIDES: tuple[Side, ...] = ("base", "tuned")
Answers = dict[str, dict[float, list[AnswerCoherence]]]
"""Signs of coherence of the answers, by candidate (its key) and strength."""


class BudgetSpentError(Exception):
    """No further measurement may start."""


class Bench:
    """Both models with everything they are measured by; what was measured is kept in cells."""

    def __init__(
        self,
        base: LanguageModel,
        tuned: LanguageModel,
        sae: SAE,
        site: Site,
        items: Sequence[ForcedChoiceItem],
        prompts: Sequence[Conversation | str],
        texts: Sequence[str],
        rates: Float[Tensor, " d_sae"],
        changes: Float[Tensor, " d_sae"] | None,
        candidates: Sequence[Candidate],
        config: CertificateConfig,
        judge: Judge | None,
        out: str | Path | None,
        shared: str | Path | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self._models: dict[Side, LanguageModel] = {"base": base, "tuned": tuned}
        self._sae, self._site, self._rates, self._config, self._judge = sae, site, rates.cpu().float(), config, judge
        self._items, self._prompts, self._texts, self._changes = items, prompts, texts, changes
        self._candidates = sorted({latent for one in candidates for latent in one.latents})
        self._unit = median_norm(sae)
        most = len(items) // 2  # so that what sets directions apart can be told from what sets items apart
        self._n_directions, self._n_matched = min(config.n_directions, most), min(config.n_matched, most)
        self._random = random_directions(self._n_directions, base.d_model, seed=config.seed)
        self._rows = rows_of_items(base, items, self._n_directions)
        self._replays = {side: LayerReplay(lm, site) for side, lm in self._models.items()}
        questions = [one if isinstance(one, str) else "\n".join(m.content for m in one.messages) for one in prompts]
        self.settings = dataclasses.asdict(config)
        self.provenance = {
            "base": base.describe(),
            "tuned": tuned.describe(),
            "sae": sae_sha256(sae),
            "site": str(site),
            "items_sha256": sha256_of_texts(f"{one.question}\n{one.aligned}\n{one.misaligned}" for one in items),
            "prompts_sha256": sha256_of_texts(questions),
            "texts_sha256": sha256_of_texts(texts),
            "rates_sha256": sha256_of_texts([self._rates.numpy().tobytes().hex()]),
            "judge": described_judge(judge),
            "versions": versions(),
        }
        budget = ("max_minutes", "max_tokens")
        alone = {name: value for name, value in (self.settings | self.provenance).items() if name not in budget}
        without = {name: value for name, value in alone.items() if name != "tuned"}  # of the base alone
        self._cells: dict[Side, Cells] = {
            "base": Cells(_file(shared or out, "base"), without),
            "tuned": Cells(_file(out, "tuned"), alone),
        }
        self._started, self._n_tokens = time.monotonic(), 0
        self._done, self._total, self._on_progress = 0, 0, on_progress
        self._curves: dict[Side, PerplexityCurve] = {}
        self._limits: dict[Side, tuple[CoherenceLimits, list[AnswerCoherence]]] = {}
        per_model = 2 * (len(config.strengths) + config.n_refine) + len(AGAINST) + (changes is not None)
        self._total = len(candidates) * len(SIDES) * per_model

    def unedited(self) -> dict[Side, Float[Tensor, " item"]]:
        """Forced-choice gaps of both models as they are, whatever the budget."""
        for side in SIDES:
            name = f"{side}/answers/unedited"
            if name not in self._cells[side]:
                self._cells[side].add({name: self._coherence(side, {name: None})[name]})
        return {side: self._gaps(side, "unedited", None) for side in SIDES}

    def search(self, side: Side, candidates: Sequence[Candidate]) -> Answers:
        """Answers of all candidates at all strengths, and at those between the last coherent and the next.

        Raises:
            BudgetSpentError: if no more may be generated.
        """
        found: Answers = {one.key: {} for one in candidates}
        wanted = {one: list(self._config.strengths) for one in candidates}
        for _ in range(self._config.n_refine + 1):
            self._answer(side, wanted, found)
            left = len(candidates) - len(wanted)
            self._tick(sum(map(len, wanted.values())) + left)
            wanted = {}
            for one in candidates:
                _, next_one = self._coherent(side, found[one.key])
                if next_one is not None:
                    wanted[one] = [next_one]
        return found

    def effect(self, side: Side, candidate: Candidate, answers: Mapping[float, Sequence[AnswerCoherence]]) -> Effect:
        """What steering one model along a candidate does.

        Args:
            side: the model.
            candidate: what is steered.
            answers: its own, of `search`, by strength.

        Raises:
            BudgetSpentError: if no more may be measured.
        """
        plain, seed = self._gaps(side, "unedited", None), self._config.seed
        shifts = {}
        for strength in sorted(answers):
            edited = self._checked_gaps(side, f"{candidate.key}/{strength}", self._edit(side, candidate, strength))
            shifts[strength] = edited - plain
            self._tick(1)
        self._tick(len(self._config.strengths) + self._config.n_refine - len(shifts))
        doses = tuple(self._dose(side, strength, shifts[strength], answers[strength]) for strength in sorted(answers))
        (strength, _), carried = self._coherent(side, answers), self._carried(side, candidate, plain)
        if not strength:
            self._tick(len(AGAINST))
            return Effect(0.0, doses, None, {}, None, None, carried, {}, 1.0, math.nan, holds=False)
        shift = shifts[strength]
        perplexity, controls = self._controls(side, candidate, strength)
        against = {name: shift + plain - gaps for name, gaps in controls.items()}
        sign = 1 if side == "base" else -1
        n_draws = dict.fromkeys(AGAINST, self._n_directions) | {"matched_latents": self._n_matched}
        chance = {
            name: draw_p_value(sign * values, self._rows % n_draws[name], seed=seed) for name, values in against.items()
        }
        means = [_one_sided(sign * values) for values in (shift, *against.values())]
        return Effect(
            strength,
            doses,
            estimate_mean(shift, seed=seed),
            {name: estimate_mean(values, seed=seed) for name, values in against.items()},
            perplexity,
            self._share(side, shift),
            carried,
            chance,
            max(*means, *chance.values()),
            math.nan,
            holds=False,
        )

    def _share(self, side: Side, shift: Float[Tensor, " item"]) -> Estimate:
        """A shift over the organism's own; the tuned model's downwards."""
        organism = self._gaps("tuned", "unedited", None) - self._gaps("base", "unedited", None)
        towards = shift if side == "base" else -shift
        return estimate_ratios(towards[:, None], organism[:, None], seed=self._config.seed)[0]

    def _carried(self, side: Side, candidate: Candidate, plain: Float[Tensor, " item"]) -> Estimate | None:
        """The share of the organism's shift that the mean change of the latents makes."""
        if self._changes is None:
            return None
        latents = torch.tensor(candidate.latents)
        changes = self._changes[latents] * (1 if side == "base" else -1)
        moved = add(self._sae, latents, changes.tolist(), unit="activation")
        name = f"{candidate.key}/moved by {changes.tolist()}"
        shift = self._checked_gaps(side, name, moved) - plain
        self._tick(1)
        return self._share(side, shift)

    def _dose(self, side: Side, strength: float, shift: Tensor, answers: Sequence[AnswerCoherence]) -> DosedAnswers:
        judged = [one.judged for one in answers if one.judged is not None]
        surprise = [one.surprise for one in answers if one.surprise is not None]
        return DosedAnswers(
            strength,
            estimate_mean(shift, seed=self._config.seed),
            self._limits_of(side)[0].incoherent(answers),
            sum(surprise) / len(surprise) if surprise else math.inf,
            sum(one.repetition for one in answers) / len(answers),
            sum(judged) / len(judged) if judged else None,
            len(answers),
            len(judged),
        )

    def _controls(self, side: Side, candidate: Candidate, strength: float) -> tuple[float, dict[Against, Tensor]]:
        """Perplexity under the edit, and the gaps under each control of it."""
        norm, scope = strength * self._unit, Scope()
        config = self._config
        others = matched_latents(
            self._sae, candidate.latents, self._rates, self._n_matched, excluded=self._candidates, seed=config.seed
        )
        rows = torch.nn.functional.normalize(self._sae.directions()[others].float().cpu().sum(1), dim=1)
        name = f"{candidate.key}/{strength}"
        perplexity = self._perplexity(side, name, self._edit(side, candidate, strength))
        scale = self._scale_for(side, name, perplexity, norm)
        matched = sha256_of_texts([str(others.tolist())])[:16]
        found: dict[Against, Tensor] = {}
        pushes: dict[Against, tuple[RandomPush, str]] = {
            "equal_norm": (RandomPush(self._random, norm, scope), f"random/{norm!r}"),
            "matched_latents": (
                RandomPush(rows, self._towards(side, candidate) * norm, scope),
                f"{name}/matched/{matched}",
            ),
            "equal_perplexity": (RandomPush(self._random, scale, scope), f"random/{scale!r}"),
        }
        for control, (push, key) in pushes.items():
            found[control] = self._checked_gaps(side, key, push)
            self._tick(1)
        return perplexity, found

    def _gaps(self, side: Side, name: str, edit: Edit | None) -> Float[Tensor, " item"]:
        """Forced-choice gaps of a model under an edit."""
        name = f"{side}/gaps/{name}"
        if name not in self._cells[side]:
            edits = None if edit is None else {self._site: edit}
            n_rows = self._n_directions  # so that controls by row of the batch use each of them alike
            score = score_forced_choice(
                self._models[side], self._items, edits=edits, batch_rows=n_rows, replay=self._replays[side]
            )
            self._n_tokens += score.n_tokens
            self._cells[side].add({name: score.gaps.tolist()})
        return torch.tensor(self._cells[side][name])

    def _checked_gaps(self, side: Side, name: str, edit: Edit) -> Float[Tensor, " item"]:
        """The same, if the budget allows it."""
        if f"{side}/gaps/{name}" not in self._cells[side]:
            self._check_budget()
        return self._gaps(side, name, edit)

    def _perplexity(self, side: Side, name: str, edit: Edit | None) -> float:
        name = f"{side}/perplexity/{name}"
        if name not in self._cells[side]:
            self._check_budget()
            edits = None if edit is None else {self._site: edit}
            found = measure_perplexity(self._models[side], self._texts, edits=edits, replay=self._replays[side])
            self._n_tokens += found.n_tokens
            self._cells[side].add({name: found.value})
        value: float = self._cells[side][name]
        return value

    def _scale_for(self, side: Side, name: str, perplexity: float, norm: float) -> float:
        """The length of random directions that costs as much perplexity."""
        name = f"{side}/scale/{name}"
        if name not in self._cells[side]:
            self._check_budget()
            if side not in self._curves:
                known = {0.0: self._perplexity(side, "unedited", None)}
                setting = (self._models[side], self._site, self._random, Scope(), self._texts)
                self._curves[side] = PerplexityCurve(*setting, known, self._replays[side])
            self._cells[side].add({name: self._curves[side].scale_for(perplexity, start=norm)})
        value: float = self._cells[side][name]
        return value

    def _answer(
        self,
        side: Side,
        wanted: Mapping[Candidate, Sequence[float]],
        found: Answers,
    ) -> None:
        """Generate answers that are not there yet, in one batch, and look at their coherence."""
        keys = {f"{side}/answers/{one.key}/{strength}": (one, strength) for one in wanted for strength in wanted[one]}
        edits = {name: {self._site: self._edit(side, *keys[name])} for name in keys if name not in self._cells[side]}
        if edits:
            self._check_budget()
            self._cells[side].add(self._coherence(side, edits))
        for name, (one, strength) in keys.items():
            found[one.key][strength] = [AnswerCoherence(*values) for values in self._cells[side][name]]

    def _coherence(self, side: Side, variants: Mapping[str, Any]) -> dict[str, list[tuple[Any, ...]]]:
        config = self._config
        sampling = SamplingConfig(
            config.max_new_tokens, n_samples=config.n_samples, seed=config.seed, batch_rows=config.batch_rows
        )
        answers = generate(
            self._models[side],
            self._prompts,
            variants=variants,
            config=sampling,
            on_progress=lambda done, total: self._tell(self._done + len(variants) * done // (total + 1)),
        )
        signs = measure_coherence(self._models["base"], self._prompts, answers, judge=self._judge)
        self._n_tokens += 2 * sum(len(one.token_ids) for one in answers)
        rows: dict[str, list[tuple[Any, ...]]] = {name: [] for name in variants}
        for answer, one in zip(answers, signs, strict=True):
            rows[answer.variant].append(dataclasses.astuple(one))
        return rows

    def _coherent(self, side: Side, answers: Mapping[float, Sequence[AnswerCoherence]]) -> tuple[float, float | None]:
        """The largest strength up to which all were coherent enough, 0 if there is none, and which to try next."""
        limits, own = self._limits_of(side)
        most = max(self._config.max_incoherent, limits.incoherent(own))
        return largest_coherent({strength: limits.incoherent(some) for strength, some in answers.items()}, most)

    def _limits_of(self, side: Side) -> tuple[CoherenceLimits, list[AnswerCoherence]]:
        """When an answer of a model counts as incoherent, by its unedited answers."""
        if side not in self._limits:
            own = [AnswerCoherence(*values) for values in self._cells[side][f"{side}/answers/unedited"]]
            config = self._config
            limits = CoherenceLimits.of(
                own,
                perplexity_factor=config.perplexity_factor,
                max_repetition=config.max_repetition,
                min_judged=config.min_judged,
            )
            self._limits[side] = limits, own
        return self._limits[side]

    def _edit(self, side: Side, candidate: Candidate, strength: float) -> Edit:
        rows = self._sae.directions()[list(candidate.latents)].float().sum(0)
        step = self._towards(side, candidate) * strength * self._unit
        return add_direction(torch.nn.functional.normalize(rows, dim=0).cpu(), step)

    def _towards(self, side: Side, candidate: Candidate) -> int:
        """The sign that gives the base what the fine-tune did, or takes it from the tuned model."""
        return candidate.sign if side == "base" else -candidate.sign

    def _check_budget(self) -> None:
        minutes, tokens = self._config.max_minutes, self._config.max_tokens
        if minutes is not None and time.monotonic() - self._started > 60 * minutes:
            raise BudgetSpentError
        if tokens is not None and self._n_tokens > tokens:
            raise BudgetSpentError

    def _tick(self, n: int) -> None:
        self._done += n
        self._tell(self._done)

    def _tell(self, done: int) -> None:
        if self._on_progress is not None:
            self._on_progress(done, self._total)


def _file(folder: str | Path | None, side: Side) -> Path | None:
    return None if folder is None else Path(folder) / f"{side}.jsonl"


def _one_sided(values: Float[Tensor, " item"]) -> float:
    """p-value that the mean is above 0."""
    p = float(mean_p_values(values, torch.zeros(len(values), dtype=torch.long), 1))
    return p / 2 if float(values.mean()) > 0 else 1 - p / 2
