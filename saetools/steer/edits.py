"""An edit: changes of the residual stream, where and when they apply, and how they go together."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saetools.models.where import Where
from saetools.sae.model import SAE
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
        conditions = tuple((condition.structure(), wanted) for condition, wanted in self.conditions)
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
    once for both; a list `[a, b]` at a site runs `b` on what `a` left. Changes of latents of one SAE within an edit go
    from left to right through f, so that the later of two on one latent has the last word; activity, conditions,
    components and projections are read from x.

    It prints as it is written; with directions that have names, `steer.parse` reads that again.
    """

    def __init__(self, parts: Sequence[Part], *, choice: Int[Tensor, " row"] | None = None) -> None:
        self.parts = tuple(parts)
        self._choice = choice  # of the stacked numbers, by row of the batch
        maps = [part.change if isinstance(part.change, LatentMap) else None for part in self.parts]
        read = {id(one.sae) for one in maps if one is not None and not one.is_constant}
        self._through_f = tuple(one is not None and id(one.sae) in read for one in maps)
        groups: dict[int, tuple[SAE, list[Tensor]]] = {}
        for one in maps:
            if one is not None and id(one.sae) in read:
                groups.setdefault(id(one.sae), (one.sae, []))[1].append(one.latents)
        for part in self.parts:
            for condition, _ in part.conditions:
                if isinstance(condition, LatentAbove):
                    asked = torch.tensor([condition.latent])
                    groups.setdefault(id(condition.sae), (condition.sae, []))[1].append(asked)
        self._asked = tuple(Asked.of(sae, latents) for sae, latents in groups.values())
        self._moved: dict[torch.device, list[Part]] = {}

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
        seen = Seen(acts, where, self._asked)
        local = None if self._choice is None else self._choice.to(where.rows.device)[where.rows]
        after: dict[int, tuple[Asked, Tensor]] = {}
        out = seen.x
        for part, through_f in zip(self._on(acts.device), self._through_f, strict=True):
            chosen = part.chosen(seen)
            if through_f:
                assert isinstance(part.change, LatentMap)
                asked = next(one for one in self._asked if one.sae is part.change.sae)
                after[id(asked.sae)] = asked, _mapped(part, seen, local, asked, after, chosen)
                continue
            step = (
                _constant(part.change, seen, local) if isinstance(part.change, LatentMap) else part.change(seen, local)
            )
            if (weights := part.weights(seen)) is not None:
                step = step * weights
            out = out + torch.where(chosen[..., None], step, 0.0)
        for asked, f in after.values():
            before = seen.latents(asked.sae)
            assert before is not None
            change = torch.where(f == before, 0.0, f - before)  # 0 too where activations overflow
            out = out + seen.written(asked.sae, asked.latents, change)
        return out.to(acts.dtype)

    def _on(self, device: torch.device) -> list[Part]:
        """The parts with their numbers on a device."""
        if device not in self._moved:
            parts: list[Part] = []
            for part in self.parts:
                change: Any = part.change
                parts.append(replace(part, change=change.to(device)))
            self._moved[device] = parts
        return self._moved[device]

    def structure(self) -> Hashable:
        """Edits of equal structure differ in numbers alone, and can be `stacked`."""
        return tuple(part.structure() for part in self.parts)

    def stacked(self, others: Sequence[SteeringEdit], choice: Int[Tensor, " row"]) -> SteeringEdit:
        """Several edits of one structure as one, for a batch whose rows have edits of their own.

        Args:
            others: the edits.
            choice: number of the row's edit among them, for every row of the batch.
        """
        parts = []
        for number, part in enumerate(self.parts):
            change: Any = part.change
            parts.append(replace(part, change=change.stacked([other.parts[number].change for other in others])))
        return SteeringEdit(parts, choice=choice)

    def _with(self, **fields: object) -> SteeringEdit:
        return SteeringEdit([replace(one, **fields) for one in self.parts])  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return " + ".join(map(str, self.parts))


def _constant(change: LatentMap, seen: Seen, local: Tensor | None) -> Tensor:
    """What a shift of activations adds to x."""
    latents, shift = (change.latents, change.numbers[..., 1, :])
    if local is None:
        return seen.written(change.sae, latents, shift.to(seen.x.dtype)[None, None])
    return seen.written(change.sae, latents[local], shift[local].to(seen.x.dtype)[:, None])


def _mapped(
    part: Part,
    seen: Seen,
    local: Tensor | None,
    asked: Asked,
    after: Mapping[int, tuple[Asked, Tensor]],
    chosen: Bool[Tensor, "row pos"],
) -> Float[Tensor, "row pos asked"]:
    """Activations of an SAE after one more change."""
    change, first = part.change, seen.latents(asked.sae)
    assert isinstance(change, LatentMap)
    assert first is not None
    f = after[id(asked.sae)][1] if id(asked.sae) in after else first
    columns = own(asked.columns(change.latents), local).expand(*f.shape[:-1], -1)
    old = f.gather(-1, columns)
    new = change.mapped(old, local)
    if (weights := part.weights(seen)) is not None:
        new = old + weights * (new - old)
    touched = chosen[..., None]
    if change.only_if_active:
        touched = touched & (first.gather(-1, columns) != 0)
    return f.scatter(-1, columns, torch.where(touched, new, old))
