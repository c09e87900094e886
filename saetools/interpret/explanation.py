"""What a model says of a latent, how well that predicts where it fires, and the files that hold it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saetools.errors import InputError, IntegrityError
from saetools.provenance import write_json
from saetools.room import enough_room
from saetools.stats import Estimate

CHANCE = 0.5
"""Balanced accuracy of a judge that knows nothing."""
_DRAWS = 10_000


@dataclass(frozen=True)
class Failure:
    """What is missing in a result, and why.

    Args:
        step: `explain`, `detection` or `fuzzing`.
        n_passages: passages that were to be shown or judged.
        reason: why they were not.
    """

    step: str
    n_passages: int
    reason: str


@dataclass(frozen=True)
class Explanation:
    """A latent in words, with scores on passages that the explainer has not seen.

    Args:
        latent: which.
        text: the explanation; `None` if there is none, for a reason in `failures`.
        model: who explained it and judged the explanation.
        detection: balanced accuracy in telling passages in which the latent fires from others; chance is 0.5. `None` if
            nothing was judged.
        fuzzing: balanced accuracy in telling marks at firing tokens from marks at others; chance is 0.5.
        n: passages that it was made from.
        failures: what is missing, and why.
        provenance: explainer, settings, hash of the passages, versions.
    """

    latent: int
    text: str | None
    model: str
    detection: Estimate | None
    fuzzing: Estimate | None
    n: int
    failures: tuple[Failure, ...]
    provenance: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write it as JSON."""
        write_json(Path(path), asdict(self))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Explanation:
        """Read what `save` wrote.

        Raises:
            IntegrityError: if the file is no explanation.
        """
        return _parse(Path(path).read_bytes(), str(path))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Explanation:
        """From its fields as plain values.

        Raises:
            KeyError, TypeError: if some are missing, or more than there are.
        """
        scores = {name: None if value[name] is None else Estimate(**value[name]) for name in ("detection", "fuzzing")}
        return cls(**{**value, **scores, "failures": tuple(Failure(**one) for one in value["failures"])})


def balanced_accuracy(right_positive: Sequence[bool], right_negative: Sequence[bool], *, seed: int = 0) -> Estimate:
    """Mean of the shares of right verdicts on positives and on negatives.

    The interval holds 95 % of the mean of two shares drawn from their posteriors under Jeffreys' prior: a bootstrap of
    a few verdicts that are all right would give an interval without width. The standard error is theirs too.

    Args:
        right_positive: whether each positive was called one.
        right_negative: whether each negative was called one.
        seed: of the draws.

    Raises:
        InputError: if there are none of either.
    """
    sides = [np.asarray(right_positive, dtype=float), np.asarray(right_negative, dtype=float)]
    if not all(map(len, sides)):
        raise InputError(
            "right_positive and right_negative",
            expected="one or more verdicts each",
            received=f"{len(sides[0])} and {len(sides[1])}",
            remedy="judge more passages",
        )
    generator = np.random.default_rng(seed)
    shares = [generator.beta(side.sum() + 0.5, (1 - side).sum() + 0.5, _DRAWS) for side in sides]
    draws = np.mean(shares, axis=0)
    mean = float(sum(side.mean() for side in sides) / 2)
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    return Estimate(mean, min(low, mean), max(high, mean), float(draws.std()), sum(map(len, sides)))


class ExplanationLog:
    """Finished explanations in a file, one line of JSON each, so that a killed run goes on where it was.

    A line is written at once and before the next begins; half a line, of a run that was killed in it, is cut off.

    Args:
        path: the file; made if there is none.

    Raises:
        IntegrityError: if a line is no explanation.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = path.read_bytes() if path.exists() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.truncate(path, len(whole))
        self.finished = _parse_lines(whole, path)

    def append(self, explanation: Explanation) -> None:
        """Write one down."""
        line = json.dumps(asdict(explanation), ensure_ascii=False).encode() + b"\n"
        with enough_room(f"explanations in {self.path}"), self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.finished[explanation.latent] = explanation


def load_explanations(path: str | Path) -> list[Explanation]:
    """The explanations that `explain_latents` has written into a file, by latent.

    Raises:
        InputError: if there is no such file.
        IntegrityError: if a line is no explanation.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("path", expected="a file that exists", received=str(path), remedy="explain latents first")
    raw = path.read_bytes()
    return [one for _, one in sorted(_parse_lines(raw[: raw.rfind(b"\n") + 1], path).items())]


def _parse_lines(raw: bytes, path: Path) -> dict[int, Explanation]:
    found = [_parse(line, f"{path}:{number}") for number, line in enumerate(raw.splitlines(), start=1)]
    return {one.latent: one for one in found}  # a later line stands for an earlier one


def _parse(raw: bytes, place: str) -> Explanation:
    try:
        return Explanation.from_json(json.loads(raw))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(f"{place} is no explanation ({error!r}); take it away and explain again") from error
