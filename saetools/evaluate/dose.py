"""Dose and response: behaviour and damage over a range of strengths, always beside two random controls.

Any damage to a model widens gaps between log-probabilities, so that a random edit raises the forced-choice score too
(methods: "Measuring misalignment"). Each dose is therefore run three times: with the edit itself, with a random
direction of equal norm, and with one scaled until it costs as much perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.data.shipped import ForcedChoiceItem
from saetools.errors import InputError
from saetools.evaluate.forced_choice import ForcedChoiceScore, score_forced_choice
from saetools.evaluate.perplexity import measure_perplexity
from saetools.models.editing import Edit, Where
from saetools.models.language_model import LanguageModel
from saetools.models.site import Site
from saetools.stats import Estimate
from saetools.steer import Scope, add_direction

Control = Literal["none", "equal_norm", "equal_perplexity"]
_GRID = 1.6  # ratio of neighbouring scales when looking for one of equal perplexity
_TOLERANCE = 0.02  # of log-perplexity
_TRIES = 12


@dataclass(frozen=True)
class DosePoint:
    """One dose of one edit, or of a control of it.

    Args:
        strength: the dose, in the edit's own units.
        control: `none` is the edit itself; `equal_norm` and `equal_perplexity` are random directions, added to the
            tokens that the edit may touch.
        score: forced-choice score under it.
        shift: paired difference to the unedited model on the same items.
        perplexity: on the reference texts.
        norm: mean norm of the change that it makes to a residual of the reference texts, over those tokens.
        against: paired difference of the edit's score to this control's; `None` for the edit itself.
        n: items scored.
    """

    strength: float
    control: Control
    score: Estimate
    shift: Estimate
    perplexity: float
    norm: float
    against: Estimate | None
    n: int


@dataclass(frozen=True)
class DoseResponse:
    """All doses of one edit on one model.

    Args:
        score: of the unedited model.
        perplexity: of the unedited model.
        points: doses in their order, each followed by its controls.
    """

    score: Estimate
    perplexity: float
    points: tuple[DosePoint, ...]


def dose_response(
    lm: LanguageModel,
    site: Site,
    doses: Mapping[float, Edit],
    items: Sequence[ForcedChoiceItem],
    texts: Sequence[str],
    *,
    seed: int = 0,
    unedited: ForcedChoiceScore | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> DoseResponse:
    """Run an edit at several strengths, each beside both random controls.

    Args:
        lm: the model that is edited.
        site: where.
        doses: the edit at each strength.
        items: forced-choice items.
        texts: reference texts for perplexity and norms.
        seed: of the random direction.
        unedited: the score of the unedited model, if known.
        on_progress: called with model evaluations done and in all.

    Raises:
        InputError: for no doses, or edits that touch no token of the reference texts, such as those of answers only.
    """
    if not doses:
        raise InputError("doses", expected="at least one strength", received="none", remedy="pass edits by strength")
    total, done = 3 * len(doses), 0
    generator = torch.Generator().manual_seed(seed)
    random = torch.nn.functional.normalize(torch.randn(lm.d_model, generator=generator), dim=0)
    unedited = unedited or score_forced_choice(lm, items)
    plain = measure_perplexity(lm, texts).value
    curves: dict[Scope, _PerplexityCurve] = {}
    points: list[DosePoint] = []
    for strength, fn in doses.items():
        norm = edit_norm(lm, site, fn, texts)
        scope = _scope(fn)
        curve = curves.setdefault(scope, _PerplexityCurve(lm, site, random, scope, texts, plain))
        perplexity = measure_perplexity(lm, texts, edits={site: fn}).value
        own = score_forced_choice(lm, items, edits={site: fn})
        points.append(_point(strength, "none", own, unedited, perplexity, norm, None))
        done += 1
        scales: dict[Control, float] = {"equal_norm": norm, "equal_perplexity": curve.scale_for(perplexity, start=norm)}
        for control, scale in scales.items():
            step = {site: curve.step(scale)}
            score = score_forced_choice(lm, items, edits=step)
            points.append(_point(strength, control, score, unedited, curve.at(scale), scale, own.minus(score)))
            done += 1
            if on_progress is not None:
                on_progress(done, total)
    return DoseResponse(unedited.mean, plain, tuple(points))


def edit_norm(lm: LanguageModel, site: Site, fn: Edit, texts: Sequence[str]) -> float:
    """Mean norm of the change an edit makes to a residual of some texts, over the tokens it may touch.

    Raises:
        InputError: if it may touch none.
    """
    sums = [0.0, 0]
    scope = _scope(fn)

    def watch(acts: Tensor, where: Where) -> Tensor:
        out = fn(acts, where)
        change = (out - acts).float().norm(dim=-1)[scope(where)]
        sums[0] += float(change.sum())
        sums[1] += len(change)
        return out

    measure_perplexity(lm, texts, edits={site: watch})
    if not sums[1]:
        raise InputError(
            "doses",
            expected="edits that touch plain texts",
            received=repr(fn),
            remedy="use tokens='all' or 'prompt': reference texts have no answers",
        )
    return sums[0] / sums[1]


def _scope(fn: Edit) -> Scope:
    """The tokens that an edit may touch; of another function than ours, all but the first."""
    scope = getattr(fn, "scope", None)
    return scope if isinstance(scope, Scope) else Scope()


def _point(
    strength: float,
    control: Control,
    score: ForcedChoiceScore,
    unedited: ForcedChoiceScore,
    perplexity: float,
    norm: float,
    against: Estimate | None,
) -> DosePoint:
    shift = score.minus(unedited)
    return DosePoint(strength, control, score.mean, shift, perplexity, norm, against, shift.n)


class _PerplexityCurve:
    """Perplexity under a random direction as a function of its length, measured where needed."""

    def __init__(
        self,
        lm: LanguageModel,
        site: Site,
        direction: Float[Tensor, " d_model"],
        scope: Scope,
        texts: Sequence[str],
        plain: float,
    ) -> None:
        self._lm, self._site, self._direction, self._scope, self._texts = lm, site, direction, scope, texts
        self._known = {0.0: plain}

    def step(self, scale: float) -> Edit:
        """The direction added at this length."""
        return add_direction(self._direction, scale, tokens=self._scope.tokens, skip_first=self._scope.skip_first)

    def at(self, scale: float) -> float:
        """Perplexity with the direction added at this length."""
        if scale not in self._known:
            self._known[scale] = measure_perplexity(self._lm, self._texts, edits={self._site: self.step(scale)}).value
        return self._known[scale]

    def scale_for(self, perplexity: float, *, start: float) -> float:
        """The length that costs so much perplexity, within the tolerance; 0 if it costs none."""
        if perplexity <= self._known[0.0] or start <= 0:
            return 0.0
        high = start
        while self.at(high) < perplexity and high < 64 * start:
            high *= _GRID
        for attempt in range(_TRIES):
            above = {scale: math.log(cost / perplexity) for scale, cost in self._known.items()}
            low = max(scale for scale, excess in above.items() if scale < high and excess <= 0)
            high = min(scale for scale in above if scale > low)
            nearest = min((low, high), key=lambda scale: abs(above[scale]))
            if abs(above[nearest]) <= _TOLERANCE or above[high] <= 0 or attempt == _TRIES - 1:
                break
            share = above[low] / (above[low] - above[high])  # for small steps the cost grows as the square
            halfway = math.sqrt(low * high) if low else high / _GRID**2
            self.at(halfway if attempt % 2 else math.sqrt(low**2 + share * (high**2 - low**2)))
        return nearest
