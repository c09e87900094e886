"""An edit: changes of the residual stream, where and when they apply, and how they go together."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saetools.models.editing import Where
from saetools.steer.changes import AffineMap, ComponentMap, LatentMap, Push, own
from saetools.steer.condition import Condition, LatentAbove, Schedule
from saetools.steer.scope import Scope, Tokens
from saetools.steer.seen import Asked, Seen


@dataclass(frozen=True, eq=False)
class Part:
    """One change, with where and when it applies.

    Args:
        change: what is done.
        scope: the tokens.
        conditions: each with whether it has to hold or not to hold.
        schedule: weight of the change over the tokens of an answer.
    """

    change: LatentMap | Push | ComponentMap | AffineMap
    scope: Scope = field(default_factory=Scope)
    conditions: tuple[tuple[Condition, bool], ...] = ()
    schedule: Schedule | None = None

    def structure(self) -> Hashable:
        """What has to be equal for two parts to run as one."""
        conditions = tuple((id(condition), wanted) for condition, wanted in self.conditions)
        return self.change.structure(), self.scope, conditions, self.schedule

    def chosen(self, seen: Seen) -> Bool[Tensor, "row pos"]:
        """The tokens it changes."""
        chosen = self.scope(seen.where)
        for condition, wanted in self.conditions:
            chosen = chosen & (condition(seen) if wanted else ~condition(seen))
        return chosen

    def weights(self, seen: Seen) -> Float[Tensor, "row pos 1"] | None:
        """Weight of the change at each position; `None` for 1."""
        return None if self.schedule is None else self.schedule(seen.where)[..., None]

    def __str__(self) -> str:
        conditions = [f"{'when' if wanted else 'unless'} {condition!r}" for condition, wanted in self.conditions]
        words = [self.change.text, str(self.scope), *conditions, "" if self.schedule is None else str(self.schedule)]
        return " ".join(word for word in words if word)


class SteeringEdit:
    """Changes of the residual stream that all read the same x: x' = x + what each of them adds.

    Made by the functions of `saetools.steer`; given to `saetools.edit`, `generate` and the evaluations. `a + b` reads x
    once for both; a list `[a, b]` at a site runs `b` on what `a` left. Latent changes of one SAE within an edit go
    from left to right through f (so that the later of two on one latent has the last word); activity, conditions,
    components and projections are read from x.

    It prints as it is written, and `steer.parse` reads that again.
    """

    def __init__(self, parts: Sequence[Part], *, rows: Int[Tensor, " row"] | None = None) -> None:
        self.parts = tuple(parts)
        self.rows = rows
        by_sae: dict[int, list[LatentMap]] = {}
        for part in self.parts:
            if isinstance(part.change, LatentMap):
                by_sae.setdefault(id(part.change.sae), []).append(part.change)
        asked_by_conditions: dict[int, list[LatentAbove]] = {}
        for part in self.parts:
            for condition, _ in part.conditions:
                if isinstance(condition, LatentAbove):
                    asked_by_conditions.setdefault(id(condition.sae), []).append(condition)
        self._asked: dict[int, Asked] = {}
        self._read: set[int] = {key for key, maps in by_sae.items() if any(one.reads for one in maps)}
        for key in by_sae.keys() | asked_by_conditions.keys():
            maps, conditions = by_sae.get(key, []), asked_by_conditions.get(key, [])
            sae = (maps or conditions)[0].sae
            groups = [one.latents for one in maps] + [torch.tensor([one.latent]) for one in conditions]
            self._asked[key] = Asked.of(sae, groups)
        self._read |= asked_by_conditions.keys()

    @property
    def scope(self) -> Scope | None:
        """The tokens it touches; `None` if its parts touch different ones."""
        scopes = {part.scope for part in self.parts}
        return scopes.pop() if len(scopes) == 1 else None

    def on(self, *tokens: Tokens, start: int = 0, skip_first: bool = True, skip_special: bool = False) -> SteeringEdit:
        """The same on some tokens only; replaces an earlier choice.

        Args:
            tokens: roles (`prompt`, `last_prompt`, `header`, `response`, `template`), `generated`, or `all`, the
                default; of several, tokens that have any.
            start: the first token of each row that counts, from 0.
            skip_first: leave the first token of each row, an attention sink, alone.
            skip_special: leave special tokens alone.

        Raises:
            InputError: for unknown tokens, or a start below 0.
        """
        scope = Scope(tokens or ("all",), start, skip_first, skip_special)
        return self._with(scope=scope)

    def when(self, condition: Condition) -> SteeringEdit:
        """The same on tokens that meet a condition, besides those it has: `steer.active`, `steer.probe`."""
        return SteeringEdit([replace(one, conditions=(*one.conditions, (condition, True))) for one in self.parts])

    def unless(self, condition: Condition) -> SteeringEdit:
        """The same on tokens that do not meet a condition."""
        return SteeringEdit([replace(one, conditions=(*one.conditions, (condition, False))) for one in self.parts])

    def over(self, points: Mapping[int, float]) -> SteeringEdit:
        """The same with a strength that changes over the tokens of an answer.

        Args:
            points: weight of the change by number of the generated token; between them it is linear, before and after
                constant. Tokens that were given have number 0: `{0: 1.0, 32: 0.0}` fades out over 32 tokens.

        Raises:
            InputError: for no points, numbers below 0, or weights that are not finite.
        """
        return self._with(schedule=Schedule.of(points))

    def __add__(self, other: SteeringEdit) -> SteeringEdit:
        return SteeringEdit([*self.parts, *other.parts]) if isinstance(other, SteeringEdit) else NotImplemented

    def __call__(self, acts: Float[Tensor, "row pos d_model"], where: Where) -> Float[Tensor, "row pos d_model"]:
        """Edit the activations of a pass."""
        seen = Seen(acts, where)
        local = None if self.rows is None else torch.searchsorted(self.rows.to(where.rows.device), where.rows)
        before = {key: seen.keep(self._asked[key]) for key in self._read}
        after: dict[int, Tensor] = {}
        total: Tensor | None = None
        for part in self.parts:
            chosen = part.chosen(seen)
            if isinstance(part.change, LatentMap):
                key = id(part.change.sae)
                if key not in before:  # nothing depends on the activations
                    before[key] = seen.x.new_zeros(*seen.x.shape[:-1], len(self._asked[key].latents))
                after[key] = self._mapped(part, seen, local, before[key], after.get(key, before[key]), chosen)
                continue
            step = part.change(seen, local)
            if (weights := part.weights(seen)) is not None:
                step = step * weights
            step = torch.where(chosen[..., None], step, 0.0)
            total = step if total is None else total + step
        for key, f in after.items():
            step = self._asked[key].written(seen, f - before[key])
            total = step if total is None else total + step
        assert total is not None
        return (seen.x + total).to(acts.dtype)

    def _mapped(
        self, part: Part, seen: Seen, local: Tensor | None, first: Tensor, f: Tensor, chosen: Tensor
    ) -> Float[Tensor, "row pos asked"]:
        """Activations after one more change."""
        change = part.change
        assert isinstance(change, LatentMap)
        columns = own(self._asked[id(change.sae)].columns(change.latents).to(f.device), local)
        columns = columns.expand(*f.shape[:-1], -1)
        old = f.gather(-1, columns)
        new = change.mapped(old, local)
        if (weights := part.weights(seen)) is not None:
            new = old + weights * (new - old)
        touched = chosen[..., None]
        if change.only_if_active:
            touched = touched & (first.gather(-1, columns) != 0)
        return f.scatter(-1, columns, torch.where(touched, new, old))

    def structure(self) -> Hashable:
        """Edits of equal structure differ in numbers alone, and can be `stacked`."""
        return tuple(part.structure() for part in self.parts)

    def stacked(self, others: Sequence[SteeringEdit], rows: Int[Tensor, " row"]) -> SteeringEdit:
        """The edits of some rows of a batch as one.

        Args:
            others: an edit of the same structure for each row.
            rows: the rows, ascending.
        """
        parts = []
        for number, part in enumerate(self.parts):
            change: Any = part.change
            parts.append(replace(part, change=change.stacked([other.parts[number].change for other in others])))
        return SteeringEdit(parts, rows=rows)

    def _with(self, **fields: object) -> SteeringEdit:
        return SteeringEdit([replace(one, **fields) for one in self.parts])  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return " + ".join(map(str, self.parts))
