"""Dose rows by what was edited, with their conclusion in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from saetools.report.value import DoseRow, PersonaReport
from saetools.report.wording import estimate, number, some_latents

CONTROLS: Mapping[str, str] = {
    "none": "the edit",
    "equal_norm": "random, equal norm",
    "equal_perplexity": "random, equal perplexity",
}
"""Names of the series, the edit itself first."""


@dataclass(frozen=True)
class DoseGroup:
    """All doses of one edit of one latent set on one model.

    Args:
        model: `base` or `tuned`.
        edit: what is done.
        latents: the latent set.
        rows: doses and controls by strength.
        perplexity: of the unedited model, if known.
    """

    model: str
    edit: str
    latents: tuple[int, ...]
    rows: tuple[DoseRow, ...]
    perplexity: float | None

    @property
    def title(self) -> str:
        """Edit, model and latents in words."""
        return f"{self.edit} on {self.model}: {some_latents(self.latents)}"

    @property
    def unedited(self) -> float:
        """Score of the unedited model on the same items."""
        return self.rows[0].score.mean - self.rows[0].shift.mean

    def series(self, control: str) -> tuple[DoseRow, ...]:
        """The rows of the edit (`none`) or of one control."""
        return tuple(row for row in self.rows if row.control == control)

    def summary(self) -> str:
        """What the two figures show."""
        before = "" if self.perplexity is None else f", perplexity {number(self.perplexity, 1)}"
        sentences = [f"Unedited: score {number(self.unedited)}{before}."]
        if doses := self.series("none"):
            largest = max(doses, key=lambda row: abs(row.shift.mean))
            sentences.append(
                f"Largest shift under the edit: {estimate(largest.shift, signed=True)} at strength "
                f"{largest.strength:g}, perplexity {number(largest.perplexity, 1)}."
            )
        for control in list(CONTROLS)[1:]:
            differences = [row.against for row in self.series(control) if row.against is not None]
            if differences:
                above, below = (sum(d.low > 0 for d in differences), sum(d.high < 0 for d in differences))
                sentences.append(
                    f"Edit minus control ({CONTROLS[control]}): interval above zero at {above}, below zero at {below} "
                    f"of {len(differences)} strengths."
                )
        return " ".join(sentences)


def group_doses(report: PersonaReport) -> tuple[DoseGroup, ...]:
    """The dose rows by model, edit and latent set, in the order in which these first appear."""
    rows: dict[tuple[str, str, tuple[int, ...]], list[DoseRow]] = {}
    for row in report.dose_response:
        rows.setdefault((row.model, row.edit, row.latents), []).append(row)
    order = list(CONTROLS)
    return tuple(
        DoseGroup(
            *key,
            rows=tuple(sorted(group, key=lambda row: (row.strength, order.index(row.control)))),
            perplexity=report.perplexity.get(key[0]),
        )
        for key, group in rows.items()
    )
