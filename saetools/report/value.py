"""The persona report as a value: what the demo and other runs find, before it is drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saetools.errors import InputError, IntegrityError
from saetools.stats import Estimate


@dataclass(frozen=True)
class ModelScore:
    """Behaviour of one model: forced-choice score, and its paired difference to the base."""

    model: str
    score: Estimate
    against_base: Estimate | None = None


@dataclass(frozen=True)
class LatentRow:
    """One of the latents that changed most."""

    latent: int
    rank: int
    delta: float
    low: float | None
    """Lower end of the change's interval; `None` where the bootstrap does not determine it."""
    high: float | None
    effect: float
    mean_base: float
    mean_tuned: float
    rate_base: float
    rate_tuned: float
    delta_twin: float | None
    """The same change in the benign twin: what fine-tuning as such does."""
    promoted: tuple[str, ...]
    suppressed: tuple[str, ...]


@dataclass(frozen=True)
class DoseRow:
    """One strength of one edit on one model, or of a random control of it."""

    model: str
    """`base` or `tuned`."""
    edit: str
    """What is done, such as `add` or `clamp`."""
    latents: tuple[int, ...]
    """The latent set."""
    strength: float
    control: str
    """`none`: the edit itself; `equal_norm`, `equal_perplexity`: random directions."""
    score: Estimate
    shift: Estimate
    """Paired difference to the unedited model."""
    against: Estimate | None
    """Paired difference of the edit to this control, on controls only."""
    perplexity: float
    norm: float
    n: int
    chance: float | None = None
    """p-value that one more random direction moves the score as far, on controls only; reports of before it was asked
    have none."""


@dataclass(frozen=True)
class AnswerRow:
    """Answers of the same prompt: text by variant (`base`, `tuned`, and edited ones)."""

    prompt: str
    answers: Mapping[str, str]


@dataclass(frozen=True)
class PersonaReport:
    """All that a report shows.

    Args:
        title: headline.
        findings: sentences of the verdict, each backed by a figure below.
        scores: behaviour of base, twin and tuned model.
        top_latents: the latents that changed most.
        dose_response: doses with controls.
        perplexity: of the unedited models by name.
        answers: before and after.
        sae: fidelity and description of the SAE.
        settings: how the run was made, in words or numbers by name.
        provenance: models, data, seeds, versions, command.
        warnings: why not to trust the diffs that latents were chosen by, such as an SAE that is blind to the change.
    """

    title: str
    findings: tuple[str, ...]
    scores: tuple[ModelScore, ...]
    top_latents: tuple[LatentRow, ...]
    dose_response: tuple[DoseRow, ...]
    perplexity: Mapping[str, float]
    answers: tuple[AnswerRow, ...]
    sae: Mapping[str, Any]
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The report as JSON text; lone surrogates, which UTF-8 cannot hold, stand as escapes."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        return re.sub(r"[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"

    @classmethod
    def from_json(cls, path: str | Path) -> PersonaReport:
        """Read a `report.json`.

        Raises:
            InputError: if there is no such file.
            IntegrityError: if it is no report.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError("path", expected="a report.json", received=str(path), remedy="run `saetools demo` first")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                title=raw["title"],
                findings=tuple(raw["findings"]),
                scores=tuple(
                    ModelScore(row["model"], Estimate(**row["score"]), _estimate(row["against_base"]))
                    for row in raw["scores"]
                ),
                top_latents=tuple(
                    LatentRow(**{**row, "promoted": tuple(row["promoted"]), "suppressed": tuple(row["suppressed"])})
                    for row in raw["top_latents"]
                ),
                dose_response=tuple(_dose(row) for row in raw["dose_response"]),
                perplexity=raw["perplexity"],
                answers=tuple(AnswerRow(**row) for row in raw["answers"]),
                sae=raw["sae"],
                settings=raw["settings"],
                provenance=raw["provenance"],
                warnings=tuple(raw.get("warnings", ())),  # reports of before they were looked for have none
            )
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path} is not a report of saetools ({error!r}); make it again") from error


def _estimate(raw: Mapping[str, Any] | None) -> Estimate | None:
    return None if raw is None else Estimate(**raw)


def _dose(raw: Mapping[str, Any]) -> DoseRow:
    return DoseRow(
        **{
            **raw,
            "latents": tuple(raw["latents"]),
            "score": Estimate(**raw["score"]),
            "shift": Estimate(**raw["shift"]),
            "against": _estimate(raw["against"]),
        }
    )
