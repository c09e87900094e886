"""The value of a causal certificate: what steering along candidates did to base and tuned model, and what follows.

Made by `certify_latents`. A candidate *induces* the behaviour if steering the base along it raises the score beyond
the unedited base and beyond what random controls of three kinds do; it *suppresses* it if steering the tuned model
against it lowers it likewise.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from saetools.errors import InputError, IntegrityError
from saetools.provenance import plain, write_json
from saetools.stats import Estimate

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import polars as pl

Verdict = Literal["both", "induces", "suppresses", "neither", "incoherent", "untested"]
Against = Literal["equal_norm", "matched_latents", "equal_perplexity"]
AGAINST: tuple[Against, ...] = get_args(Against)


@dataclass(frozen=True)
class Candidate:
    """What may be a cause: one latent, or a set steered together along the sum of its unit decoder rows.

    Args:
        name: how it is called.
        latents: one or several.
        sign: 1 if the fine-tune raised it, -1 if it lowered it: then the base is steered against it.
    """

    name: str
    latents: tuple[int, ...]
    sign: int = 1

    def __post_init__(self) -> None:
        if not self.latents or self.sign not in (1, -1):
            raise InputError(
                "candidates",
                expected="latents, and a sign of 1 or -1",
                received=f"{self.latents} and {self.sign}",
                remedy="name at least one latent",
            )

    @property
    def key(self) -> str:
        """What is steered, whatever it is called: `+(3,17)`."""
        return ("+" if self.sign > 0 else "-") + f"({','.join(map(str, sorted(self.latents)))})"


@dataclass(frozen=True)
class DosedAnswers:
    """One strength on one model.

    Args:
        strength: in median residual norms; the tuned model is steered by as much in the other direction.
        shift: change of the score against the same model unedited, paired over items.
        incoherent: share of incoherent answers.
        surprise: mean over the answers of nats a token under the unedited base.
        repetition: mean share of repeated trigrams.
        judged: mean score of the judge, if there is one.
        n_answers: answers looked at.
        n_judged: of them, those that the judge gave a readable score.
    """

    strength: float
    shift: Estimate
    incoherent: float
    surprise: float
    repetition: float
    judged: float | None
    n_answers: int
    n_judged: int


@dataclass(frozen=True)
class Effect:
    """What steering by the largest coherent strength did to one model.

    Args:
        strength: that strength; 0 if not even the smallest was coherent.
        doses: all strengths, ascending.
        shift: change of the score at that strength; `None` at strength 0.
        against: score minus that of each control: random directions of equal norm, random latents matched in decoder
            norm and firing rate (pushed the same way), random directions of equal perplexity.
        perplexity: of the steered model on the reference texts.
        share: the shift over the organism's own: how much of it steering can give the base, or take from the tuned
            model. It may exceed 1, and speaks of the direction, not of what the fine-tune did along it.
        carried: of the organism's shift, what the fine-tune's own mean change of these latents carries: what the base
            gains when it is added on every token (sufficient), or the tuned model loses when it is taken back
            (necessary); `None` if the changes were not given.
        chance: by control, one-sided p-value that its effect is that of one more random draw of this kind
            (`significance.draw_p_value`): random latents and directions have effects, too, and differ in them.
        p_value: one-sided, that it does not go beyond the unedited model, the mean of one of the controls, or one more
            draw of one (the largest of seven).
        q_value: the false discovery rate over all candidates, of both models; NaN at strength 0.
        holds: whether it does, at the false discovery rate of the settings, and makes up the least share that counts.
    """

    strength: float
    doses: tuple[DosedAnswers, ...]
    shift: Estimate | None
    against: Mapping[Against, Estimate]
    perplexity: float | None
    share: Estimate | None
    carried: Estimate | None
    chance: Mapping[Against, float]
    p_value: float
    q_value: float
    holds: bool


@dataclass(frozen=True)
class Certificate:
    """What one candidate does.

    Args:
        candidate: what was steered.
        induces: of the base.
        suppresses: of the tuned model.
        verdict: `both`, `induces`, `suppresses`, `neither`; `incoherent` if no strength left the answers of either
            model coherent; `untested` if the budget ended before.
    """

    candidate: Candidate
    induces: Effect | None
    suppresses: Effect | None
    verdict: Verdict


@dataclass(frozen=True)
class Certification:
    """Certificates of all candidates for one organism.

    Args:
        certificates: in the order of the candidates.
        base: score of the base.
        tuned: score of the tuned model.
        shift: tuned minus base, paired over items.
        warnings: what stands in the way of reading it, if anything.
        settings: how it was measured.
        provenance: models, SAE, data, versions.
    """

    certificates: tuple[Certificate, ...]
    base: Estimate
    tuned: Estimate
    shift: Estimate
    warnings: tuple[str, ...]
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def table(self) -> pl.DataFrame:
        """One row a candidate: verdict, and for both models strength, shift and shares with intervals, chance and q."""
        import polars as pl

        rows = []
        for one in self.certificates:
            row: dict[str, Any] = {
                "candidate": one.candidate.name,
                "latents": list(one.candidate.latents),
                "sign": one.candidate.sign,
                "verdict": one.verdict,
            }
            for name, effect in (("induces", one.induces), ("suppresses", one.suppresses)):
                row[f"{name}_strength"] = None if effect is None else effect.strength
                for field in ("shift", "share", "carried"):
                    value = None if effect is None else getattr(effect, field)
                    for end in ("mean", "low", "high"):
                        row[f"{name}_{field}" + ("" if end == "mean" else f"_{end}")] = _number(value, end)
                row[f"{name}_chance"] = None if effect is None or not effect.chance else max(effect.chance.values())
                row[f"{name}_q"] = None if effect is None or math.isnan(effect.q_value) else effect.q_value
            rows.append(row)
        return pl.DataFrame(rows, infer_schema_length=None)

    def figure(self, candidate: str) -> go.Figure:
        """Shift of the score and share of incoherent answers over the strength, for both models.

        Raises:
            InputError: for a name that no candidate has, or one that was not tested.
        """
        import plotly.graph_objects as go

        found = {one.candidate.name: one for one in self.certificates}.get(candidate)
        if found is None or found.induces is None or found.suppresses is None:
            raise InputError(
                "candidate", expected="one that was tested", received=repr(candidate), remedy="see the table"
            )
        figure = go.Figure()
        sides = (
            ("base, steered towards", found.induces, "#c2410c"),
            ("tuned, steered away", found.suppresses, "#1d4ed8"),
        )
        for name, effect, colour in sides:
            x = [dose.strength for dose in effect.doses]
            shifts = [dose.shift for dose in effect.doses]
            bars = {
                "array": [shift.high - shift.mean for shift in shifts],
                "arrayminus": [shift.mean - shift.low for shift in shifts],
            }
            y = [shift.mean for shift in shifts]
            figure.add_scatter(x=x, y=y, error_y=bars, name=name, mode="lines+markers", line_color=colour)
            broken = [dose.incoherent for dose in effect.doses]
            figure.add_scatter(
                x=x,
                y=broken,
                name=name + ": incoherent",
                yaxis="y2",
                mode="lines",
                line={"dash": "dot", "color": colour},
            )
            if effect.strength:
                figure.add_vline(effect.strength, line_dash="dash", line_color=colour)
        figure.update_layout(
            title=candidate,
            xaxis_title="strength, in median residual norms",
            yaxis_title="shift of the score, nats a token",
            yaxis2={"title": "share of incoherent answers", "overlaying": "y", "side": "right", "range": [0, 1]},
            template="plotly_white",
        )
        return figure

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is undefined is null."""
        out: dict[str, Any] = plain(dataclasses.asdict(self))
        return out

    def save(self, path: str | Path) -> Path:
        """Write a JSON file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_json())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Certification:
        """Read what `save` wrote.

        Raises:
            InputError: if there is no such file.
            IntegrityError: if it is damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError("path", expected="a certification", received=str(path), remedy="save one there")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            certificates = tuple(_certificate(one) for one in value["certificates"])
            base, tuned, shift = (Estimate.from_json(value[name]) for name in ("base", "tuned", "shift"))
            said, settings, provenance = tuple(value["warnings"]), value["settings"], value["provenance"]
            return cls(certificates, base, tuned, shift, said, settings, provenance)
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path} is damaged ({error!r}); certify again") from error


def verdict_of(induces: Effect, suppresses: Effect) -> Verdict:
    """What two effects say together."""
    if not induces.strength and not suppresses.strength:
        return "incoherent"
    if induces.holds and suppresses.holds:
        return "both"
    return "induces" if induces.holds else "suppresses" if suppresses.holds else "neither"


def _number(value: Estimate | None, name: str) -> float | None:
    number = None if value is None else getattr(value, name)
    return number if number is not None and math.isfinite(number) else None


def _certificate(value: dict[str, Any]) -> Certificate:
    candidate = value["candidate"]
    induces, suppresses = (None if value[name] is None else _effect(value[name]) for name in ("induces", "suppresses"))
    named = Candidate(candidate["name"], tuple(candidate["latents"]), candidate["sign"])
    return Certificate(named, induces, suppresses, value["verdict"])


def _effect(value: dict[str, Any]) -> Effect:
    doses = tuple(DosedAnswers(**{**dose, "shift": Estimate.from_json(dose["shift"])}) for dose in value["doses"])
    estimates = {
        name: None if value[name] is None else Estimate.from_json(value[name]) for name in ("shift", "share", "carried")
    }
    against = {name: Estimate.from_json(one) for name, one in value["against"].items()}
    q_value = math.nan if value["q_value"] is None else value["q_value"]
    return Effect(**{**value, "doses": doses, "against": against, "q_value": q_value, **estimates})
