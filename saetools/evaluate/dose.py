"""Dose and response: behaviour and damage over a range of strengths, always beside two random controls.

Any damage to a model widens gaps between log-probabilities, so that a random edit raises the forced-choice score too
(methods: "Measuring misalignment"). Each dose is therefore run three times: with the edit itself, with random
directions of equal norm, and with random directions scaled until they cost as much perplexity (`evaluate.controls`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from saetools.data.shipped import ForcedChoiceItem
from saetools.errors import InputError
from saetools.evaluate.controls import PerplexityCurve, random_directions
from saetools.evaluate.forced_choice import ForcedChoiceScore, rows_of_items, score_forced_choice
from saetools.evaluate.perplexity import measure_perplexity
from saetools.models.language_model import LanguageModel
from saetools.models.replay import LayerReplay
from saetools.models.site import Site
from saetools.models.where import Edit, Where
from saetools.significance import draw_p_value
from saetools.stats import Estimate
from saetools.steer.edits import SteeringEdit
from saetools.steer.scope import Scope

Control = Literal["none", "equal_norm", "equal_perplexity"]
_N_DIRECTIONS = 32  # random directions at most, dealt to the rows of each batch, of as many, in turn


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
        chance: one-sided p-value that the edit moves the score no further its way than one more such random direction
            may (`significance.draw_p_value`); `None` for the edit itself, and for fewer than four items.
    """

    strength: float
    control: Control
    score: Estimate
    shift: Estimate
    perplexity: float
    norm: float
    against: Estimate | None
    n: int
    chance: float | None = None


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
        seed: of the random directions.
        unedited: the score of the unedited model, if known.
        on_progress: called with model evaluations done and in all.

    Raises:
        InputError: for no doses, or edits that touch no token of the reference texts, such as those of answers only.
    """
    if not doses:
        raise InputError("doses", expected="at least one strength", received="none", remedy="pass edits by strength")
    total, done = 3 * len(doses), 0
    enough = len(items) >= 4
    n_directions = min(_N_DIRECTIONS, len(items) // 2) if enough else _N_DIRECTIONS  # so that each serves several
    random, rows = random_directions(n_directions, lm.d_model, seed=seed), rows_of_items(lm, items, n_directions)
    replay = LayerReplay(lm, site)
    unedited = unedited or score_forced_choice(lm, items, batch_rows=n_directions, replay=replay)
    plain = measure_perplexity(lm, texts, replay=replay).value
    curves: dict[Scope, PerplexityCurve] = {}
    points: list[DosePoint] = []
    for strength, fn in doses.items():
        perplexity, norm = _perplexity_and_norm(lm, site, fn, texts, replay)
        scope = _scope(fn)
        curve = curves.setdefault(scope, PerplexityCurve(lm, site, random, scope, texts, {0.0: plain}, replay))
        own = score_forced_choice(lm, items, edits={site: fn}, batch_rows=n_directions, replay=replay)
        way = 1 if own.minus(unedited).mean >= 0 else -1
        points.append(_point(strength, "none", own, unedited, perplexity, norm, None))
        done += 1
        scales: dict[Control, float] = {"equal_norm": norm, "equal_perplexity": curve.scale_for(perplexity, start=norm)}
        for control, scale in scales.items():
            step = {site: curve.step(scale)}
            score = score_forced_choice(lm, items, edits=step, batch_rows=n_directions, replay=replay)
            point = _point(strength, control, score, unedited, curve.at(scale), scale, own.minus(score))
            if enough:
                point = replace(point, chance=draw_p_value(way * (own.gaps - score.gaps), rows, seed=seed))
            points.append(point)
            done += 1
            if on_progress is not None:
                on_progress(done, total)
    return DoseResponse(unedited.mean, plain, tuple(points))


def edit_norm(lm: LanguageModel, site: Site, fn: Edit, texts: Sequence[str]) -> float:
    """Mean norm of the change an edit makes to a residual of some texts, over the tokens it may touch.

    Raises:
        InputError: if it may touch none.
    """
    return _perplexity_and_norm(lm, site, fn, texts, LayerReplay(lm, site))[1]


def _perplexity_and_norm(
    lm: LanguageModel, site: Site, fn: Edit, texts: Sequence[str], replay: LayerReplay
) -> tuple[float, float]:
    """Perplexity under an edit, and the mean norm of the change it makes."""
    sums = [0.0, 0]
    scope = _scope(fn)

    def watch(acts: Tensor, where: Where) -> Tensor:
        out = fn(acts, where)
        change = (out - acts).float().norm(dim=-1)[scope(where)]
        sums[0] += float(change.sum())
        sums[1] += len(change)
        return out

    perplexity = measure_perplexity(lm, texts, edits={site: watch}, replay=replay).value
    if not sums[1]:
        raise InputError(
            "doses",
            expected="edits that touch plain texts",
            received=repr(fn),
            remedy="edit all tokens or prompts: reference texts have no answers",
        )
    return perplexity, sums[0] / sums[1]


def _scope(fn: Edit) -> Scope:
    """The tokens that an edit may touch; of another function than ours, all but the first.

    Raises:
        InputError: if parts of it touch different tokens, where no control would be like it.
    """
    if not isinstance(fn, SteeringEdit):
        return Scope()
    if fn.scope is None:
        raise InputError(
            "doses", expected="edits whose parts touch the same tokens", received=repr(fn), remedy="give them apart"
        )
    return fn.scope


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
