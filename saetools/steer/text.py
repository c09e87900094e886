"""Edits as text: `clamp 6400,77=0 on response + add 12=0.3*norm when 77>0.5`; what an edit prints is what is read.

edit:      part + part + ...
part:      change [if active] [on ROLE,...] [from N] [with first] [without special] [when C] [unless C] [over N:W,...]
change:    add | clamp | clamp_min | clamp_max L,L=VALUE ...     VALUE: number, number*p99 or number*norm
           scale L,L=NUMBER ...      ablate L,L
           add_direction NAME=VALUE  project_out NAME  project_to NAME=NUMBER  cap NAME=LOW..HIGH
condition: LATENT>NUMBER or NAME>NUMBER
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.errors import InputError
from saetools.models.site import Site
from saetools.sae.model import SAE
from saetools.steer import directions as on_directions
from saetools.steer import latents as on_latents
from saetools.steer.condition import Condition, active, probe
from saetools.steer.edits import SteeringEdit
from saetools.steer.numbers import MODIFIERS, Unit
from saetools.steer.scope import TOKENS, Tokens

_WITH_UNITS = ("add", "clamp", "clamp_min", "clamp_max")
_ON_LATENTS = (*_WITH_UNITS, "scale", "ablate")
_ON_DIRECTIONS = ("add_direction", "project_out", "project_to", "cap")


def parse(
    text: str,
    *,
    sae: SAE | None = None,
    directions: Mapping[str, Float[Tensor, " d_model"]] | None = None,
    median_norm: float | None = None,
) -> SteeringEdit:
    """Read an edit as it prints.

    Args:
        text: the edit.
        sae: whose latents are meant.
        directions: directions by name.
        median_norm: of the site, for `add_direction` in norms; by default that of the SAE.

    Raises:
        InputError: for text that is no edit, naming the word; for latents without an SAE, or unknown names.

    Example:
        >>> parse("project_out evil on response + cap evil=..2", directions={"evil": torch.ones(4)})
        project_out evil on response + cap evil=..2
    """
    if median_norm is None and sae is not None:
        median_norm = sae.metadata.median_norm
    known = _Known(sae, dict(directions or {}), median_norm)
    edits = [_Part(part.split(), text, known).edit() for part in text.split(" + ")]
    return sum(edits[1:], edits[0])


def parse_edits(
    texts: Sequence[str],
    *,
    sae: SAE | None = None,
    site: Site | None = None,
    directions: Mapping[str, Mapping[Site, Float[Tensor, " d_model"]]] | None = None,
) -> dict[Site, list[SteeringEdit]]:
    """Read edits of one or several sites; those of a site run in their order.

    Args:
        texts: edits, each at `site`, or at one that is put before it: `blocks.3.hook_resid_post: project_out evil`.
        sae: whose latents are meant, at its site.
        site: of the SAE, and of texts that name none; by default what the SAE's metadata says.
        directions: directions by name, each at some sites.

    Raises:
        InputError: as `parse`; for latents at another site than the SAE's, or an edit without a site.

    Example:
        >>> evil = {Site(3): torch.ones(4)}
        >>> parse_edits(["blocks.3.hook_resid_post: project_out evil"], directions={"evil": evil})
        {Site(layer=3, stream='resid_post'): [project_out evil]}
    """
    if site is None and sae is not None and sae.metadata.site:
        site = Site.parse(sae.metadata.site)
    edits: dict[Site, list[SteeringEdit]] = {}
    for text in texts:
        before, colon, rest = text.partition(": ")
        at, change = (Site.parse(before.strip()), rest) if colon else (site, text)
        if at is None:
            raise InputError(
                "edit", expected="a site before it", received=repr(text), remedy="write blocks.3.hook_resid_post: ..."
            )
        here = {name: vectors[at] for name, vectors in (directions or {}).items() if at in vectors}
        edits.setdefault(at, []).append(parse(change, sae=sae if at == site else None, directions=here))
    return edits


def latents_in(text: str) -> list[int]:
    """The latents that an edit changes, by its text.

    Args:
        text: an edit, as `parse_edits` takes it.

    Example:
        >>> latents_in("blocks.3.hook_resid_post: clamp 6400,77=0 on response + add 12=0.3*norm when 77>0.5")
        [6400, 77, 12]
    """
    found = []
    for part in text.rpartition(": ")[2].split(" + "):
        kind, *words = part.split()
        operands = words[: next((place for place, word in enumerate(words) if word in MODIFIERS), len(words))]
        if kind in _ON_LATENTS:
            found += [int(one) for word in operands for one in word.partition("=")[0].split(",")]
    return found


@dataclass(frozen=True)
class _Known:
    sae: SAE | None
    directions: Mapping[str, Tensor]
    median_norm: float | None


@dataclass
class _Part:
    """The words of one change and its modifiers."""

    words: list[str]
    text: str
    known: _Known
    place: int = field(default=0)

    def edit(self) -> SteeringEdit:
        """The edit that they say."""
        kind = self._next("a change, such as clamp")
        if kind not in (*_ON_LATENTS, *_ON_DIRECTIONS):
            raise self._error("one of " + ", ".join((*_ON_LATENTS, *_ON_DIRECTIONS)), kind)
        operands = self._until_modifier()
        if not operands:
            raise self._error(f"what to {kind}", "nothing")
        if_active = self._skip("if", "active")
        made = (
            self._on_latents(kind, operands, if_active)
            if kind in _ON_LATENTS
            else self._on_direction(kind, operands, if_active)
        )
        scope: dict[str, Any] = {}
        tokens: tuple[Tokens, ...] = ()
        seen: set[str] = set()
        while self.place < len(self.words):
            word = self._next("a modifier")
            if word in seen:
                raise self._error(f"{word!r} once", word)
            seen |= {word} - {"when", "unless"}
            match word:
                case "on":
                    tokens = tuple(self._tokens(name) for name in self._next("token roles").split(","))
                case "from":
                    scope["start"] = self._whole(self._next("the first token's number"))
                case "with":
                    self._expect("first")
                    scope["skip_first"] = False
                case "without":
                    self._expect("special")
                    scope["skip_special"] = True
                case "when":
                    made = made.when(self._condition(self._next("a condition")))
                case "unless":
                    made = made.unless(self._condition(self._next("a condition")))
                case "over":
                    made = made.over(self._points(self._next("weights, such as 0:1,32:0")))
                case "if":
                    raise self._error("`if active` right after the change", word)
                case _:
                    raise self._error("one of " + ", ".join(MODIFIERS), word)
        return made.on(*tokens, **scope) if tokens or scope else made

    def _on_latents(self, kind: str, operands: list[str], if_active: bool) -> SteeringEdit:
        sae = self._sae()
        if kind == "ablate":
            if if_active:
                raise self._error("ablate without `if active`, which it means in any case", "if active")
            return on_latents.ablate(sae, [one for word in operands for one in self._latents(word)])
        latents: list[int] = []
        values: list[float] = []
        units: set[Unit] = set()
        for word in operands:
            names, equals, value = word.partition("=")
            if not equals:
                raise self._error("LATENT=VALUE", word)
            number, unit = self._value(value)
            units.add(unit)
            for latent in self._latents(names):
                latents.append(latent)
                values.append(number)
        if len(units) > 1:
            raise self._error("one unit for all latents of a change", ", ".join(sorted(units)))
        if kind == "scale":
            if units != {"activation"} or if_active:
                raise self._error("scale with plain factors, without `if active`", " ".join(self.words))
            return on_latents.scale(sae, latents, values)
        change = getattr(on_latents, kind)
        made: SteeringEdit = change(sae, latents, values, unit=units.pop(), only_if_active=if_active)
        return made

    def _on_direction(self, kind: str, operands: list[str], if_active: bool) -> SteeringEdit:
        if len(operands) != 1 or if_active:
            raise self._error(f"{kind} with one direction", " ".join(self.words))
        name, equals, value = operands[0].partition("=")
        if (kind == "project_out") == bool(equals):
            raise self._error("project_out NAME" if equals else f"{kind} NAME=VALUE", operands[0])
        if kind == "project_out":
            vectors = [self._direction(one) for one in name.split(",")]
            return on_directions.project_out(vectors[0] if len(vectors) == 1 else torch.stack(vectors), name=name)
        direction = self._direction(name)
        match kind:
            case "project_to":
                return on_directions.project_to(direction, self._number(value), name=name)
            case "cap":
                low, dots, high = value.partition("..")
                if not dots:
                    raise self._error("cap NAME=LOW..HIGH, either of which may be left out", operands[0])
                ends = {"low": low, "high": high}
                bounds = {end: self._number(text) for end, text in ends.items() if text}
                return on_directions.cap(direction, **bounds, name=name)
        number, unit = self._value(value)
        if unit == "p99" or (unit == "norm" and self.known.median_norm is None):
            raise self._error("units of the direction, or a median norm", value)
        norm = self.known.median_norm if unit == "norm" else None
        return on_directions.add_direction(direction, number, median_norm=norm, name=name)

    def _condition(self, word: str) -> Condition:
        name, above, value = word.partition(">")
        if _is_whole(name):
            return active(self._sae(), self._whole(name), above=self._number(value) if above else None)
        if not above:
            raise self._error("LATENT, LATENT>NUMBER or NAME>NUMBER", word)
        return probe(self._direction(name), above=self._number(value), name=name)

    def _points(self, word: str) -> dict[int, float]:
        points = {}
        for one in word.split(","):
            step, colon, weight = one.partition(":")
            if not colon or self._whole(step) in points:
                raise self._error("weights, such as 0:1,32:0, each step once", word)
            points[self._whole(step)] = self._number(weight)
        return points

    def _tokens(self, name: str) -> Tokens:
        if name not in TOKENS:
            raise self._error("some of " + ", ".join(TOKENS), name)
        return name

    def _sae(self) -> SAE:
        if self.known.sae is None:
            raise self._error("edits of directions, where no SAE is given", " ".join(self.words))
        return self.known.sae

    def _direction(self, name: str) -> Tensor:
        if name not in self.known.directions:
            known = " or ".join(self.known.directions)
            raise self._error(
                f"a direction called {known}" if known else "a direction at this site, and there is none", name
            )
        return self.known.directions[name]

    def _latents(self, word: str) -> list[int]:
        return [self._whole(latent) for latent in word.split(",")]

    def _value(self, word: str) -> tuple[float, Unit]:
        number, star, unit = word.partition("*")
        if star and unit not in ("p99", "norm"):
            raise self._error("number, number*p99 or number*norm", word)
        return self._number(number), cast(Unit, unit or "activation")

    def _number(self, word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self._error("a finite number", word)
        return value

    def _whole(self, word: str) -> int:
        if not _is_whole(word):
            raise self._error("a whole number", word)
        return int(word)

    def _until_modifier(self) -> list[str]:
        start = self.place
        while self.place < len(self.words) and self.words[self.place] not in MODIFIERS:
            self.place += 1
        return self.words[start : self.place]

    def _skip(self, *wanted: str) -> bool:
        if tuple(self.words[self.place : self.place + len(wanted)]) != wanted:
            return False
        self.place += len(wanted)
        return True

    def _expect(self, wanted: str) -> None:
        if (word := self._next(wanted)) != wanted:
            raise self._error(wanted, word)

    def _next(self, expected: str) -> str:
        if self.place >= len(self.words):
            raise self._error(expected, "the end")
        self.place += 1
        return self.words[self.place - 1]

    def _error(self, expected: str, received: str) -> InputError:
        return InputError(
            "edit", expected=expected, received=f"{received!r} in {self.text!r}", remedy="see saetools.steer.text"
        )


def _is_whole(word: str) -> bool:
    """Whether a word is a whole number that a tensor can hold."""
    return word.isascii() and word.isdecimal() and len(word) < 18
