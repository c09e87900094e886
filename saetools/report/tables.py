"""The report's sections and tables, as values that HTML and Markdown both draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from saetools.evaluate.role_fidelity import DENSE_RATE
from saetools.report.doses import CONTROLS, DoseGroup
from saetools.report.value import LatentRow, PersonaReport
from saetools.report.wording import interval, number, percent, plain, token
from saetools.stats import Estimate


@dataclass(frozen=True)
class Section:
    """A section's name in the navigation, its title and its first words."""

    name: str
    title: str
    intro: str = ""


SECTIONS: Mapping[str, Section] = {
    "findings": Section("Findings", "Findings"),
    "behaviour": Section(
        "Behaviour",
        "Behaviour",
        "The forced-choice score is the mean over questions of log p(misaligned answer) \u2212 log p(aligned answer) "
        "per token: the higher, the more misaligned. Below zero a model still finds the aligned answers likelier.",
    ),
    "latents": Section(
        "Latents",
        "Latents that the fine-tune woke",
        "Both models read the same conversations; every latent's mean activation is compared, base against tuned. The "
        "benign twin had the same fine-tune on harmless answers: what rises there too comes from fine-tuning as such. "
        "The latents are chosen for their change, so the largest changes are somewhat overstated.",
    ),
    "doses": Section(
        "Dose and response",
        "Dose and response",
        "Each edit of the latents is run at several strengths beside two random controls: directions that move the "
        "residual stream as far, and directions that cost as much perplexity, different ones for different questions. "
        "Any damage to a model moves its score, so the honest comparison is at equal perplexity; edit minus control is "
        "paired over the same questions. Intervals are not corrected for the number of strengths.",
    ),
    "answers": Section(
        "Answers",
        "Answers before and after",
        "The same prompts, answered by every variant; answers are shown whole.",
    ),
    "sae": Section(
        "SAE",
        "Fidelity of the sparse autoencoder",
        "What the latents can be trusted to stand for: how much of the residual stream, and of the model's own "
        "predictions, survives in the reconstruction.",
    ),
    "provenance": Section("Provenance", "Settings and provenance", "What was run, on what, and with which versions."),
}
"""The sections by their anchors, in the order of the page."""

NONE = "\u2013"
"""What a cell without a value shows."""
INTERVALS = "Intervals are 95 % bootstrap intervals over questions or conversations."
WARNINGS = "Warnings: what speaks against trusting the comparison of latents."

_MEASURES: Mapping[str, tuple[str, str]] = {
    "fvu": ("FVU", "fraction of variance unexplained; 0 is perfect"),
    "l0": ("L0", "active latents per token, on average"),
    "dead": ("Dead latents", "share that fired on no counted token"),
    "dense": ("Dense latents", f"share that fired on more than {100 * DENSE_RATE:g} % of counted tokens"),
    "cosine": ("Cosine", "of residual and reconstruction, on average"),
    "ce_recovered": ("CE recovered", "(CE zero \u2212 CE spliced) / (CE zero \u2212 CE clean); 1 is perfect"),
    "ce_recovered_mean": ("CE recovered, mean", "the same with the mean residual in place of zeros"),
    "kl": ("KL", "from the model to itself with the reconstruction spliced in, nats per token"),
    "kl_recovered": ("KL recovered", "1 \u2212 KL / KL with zeros in place of the residual"),
    "kl_recovered_mean": ("KL recovered, mean", "the same with the mean residual in place of zeros"),
    "ce_clean": ("CE clean", "cross-entropy of the next token, nats"),
    "ce_sae": ("CE spliced", "with the reconstruction in place of the residual stream"),
    "ce_mean": ("CE mean", "with the mean residual in its place"),
    "ce_zero": ("CE zero", "with zeros in its place"),
    "n_conversations": ("Conversations", "over which intervals resample"),
    "n_tokens": ("Tokens", "counted; first positions are not"),
    "n_predictions": ("Predictions", "counted by cross-entropies: tokens with a next one"),
}


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a lesser part of it (an interval), what it sorts by, and tokens where it lists some."""

    text: str = ""
    detail: str = ""
    sort: float | int | None = None
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """A column's header, an explanation, and what its cells hold."""

    name: str
    hint: str = ""
    kind: Literal["number", "text", "tokens"] = "number"


@dataclass(frozen=True)
class Table:
    """A table; the first column names its rows."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


def score_table(report: PersonaReport) -> Table:
    """Forced-choice scores by model."""
    return Table(
        "Forced-choice score by model",
        (
            Column("model", kind="text"),
            Column("score", "mean log p(misaligned) \u2212 log p(aligned) per token"),
            Column("against base", "paired difference on the same questions"),
            Column("standard errors", "the paired difference in units of its standard error"),
            Column("questions"),
        ),
        tuple(
            (
                Cell(row.model),
                _estimate_cell(row.score),
                _estimate_cell(row.against_base, signed=True),
                _standard_errors(row.against_base),
                count_cell(row.score.n),
            )
            for row in report.scores
        ),
    )


def latent_table(report: PersonaReport) -> Table:
    """The latents that changed most."""
    return Table(
        "Latents by change of mean activation, tuned \u2212 base",
        (
            Column("latent"),
            Column("rank"),
            Column("delta", "change of mean activation, tuned \u2212 base"),
            Column("twin", "the same change in the benign twin"),
            Column("effect", "delta / standard deviation over conversations"),
            Column("mean, base \u2192 tuned", "mean activation; sorts by the tuned model's"),
            Column(
                "fires, base \u2192 tuned", "share of tokens on which the latent is active; sorts by the tuned model's"
            ),
            Column("promotes", "tokens whose logits its direction raises most", "tokens"),
            Column("suppresses", "tokens whose logits its direction lowers most", "tokens"),
        ),
        tuple(map(_latent_cells, report.top_latents)),
    )


def _latent_cells(row: LatentRow) -> tuple[Cell, ...]:
    return (
        Cell(str(row.latent), sort=row.latent),
        count_cell(row.rank),
        interval_cell(row.delta, row.low, row.high, signed=True),
        Cell(NONE) if row.delta_twin is None else Cell(number(row.delta_twin, signed=True), sort=row.delta_twin),
        Cell(number(row.effect, 2, signed=True), sort=row.effect),
        Cell(f"{number(row.mean_base)} \u2192 {number(row.mean_tuned)}", sort=row.mean_tuned),
        Cell(f"{percent(row.rate_base)} \u2192 {percent(row.rate_tuned)}", sort=row.rate_tuned),
        token_cell(row.promoted),
        token_cell(row.suppressed),
    )


def dose_table(group: DoseGroup) -> Table:
    """All doses of one group, each followed by its controls."""
    return Table(
        f"Doses of {group.title}",
        (
            Column("strength"),
            Column("what", "the edit itself or random directions", "text"),
            Column("score"),
            Column("shift", "paired difference to the unedited model"),
            Column("edit \u2212 control", "paired difference of the edit's score to this control's"),
            Column("chance", "p-value that one more random direction moves the score as far"),
            Column("perplexity"),
            Column("norm", "mean norm of the change to the residual stream"),
            Column("questions"),
        ),
        tuple(
            (
                Cell(f"{row.strength:g}", sort=row.strength),
                Cell(CONTROLS[row.control]),
                _estimate_cell(row.score),
                _estimate_cell(row.shift, signed=True),
                _estimate_cell(row.against, signed=True),
                Cell(NONE) if row.chance is None else Cell(f"{row.chance:.2g}", sort=row.chance),
                Cell(number(row.perplexity, 2), sort=row.perplexity),
                Cell(number(row.norm, 2), sort=row.norm),
                count_cell(row.n),
            )
            for row in group.rows
        ),
    )


def fidelity_table(report: PersonaReport) -> Table:
    """Fidelity measures, one column for each token role or model they were taken on.

    `report.sae` holds the measures themselves, or mappings of measures by name.
    """
    measured = _measured(report.sae)
    return Table(
        "Fidelity",
        (Column("measure", kind="text"), *(Column(name) for name in measured), Column("meaning", kind="text")),
        tuple(
            (Cell(label), *(_measure_cell(key, values) for values in measured.values()), Cell(meaning))
            for key, (label, meaning) in _MEASURES.items()
            if any(key in values for values in measured.values())
        ),
    )


def sae_facts(report: PersonaReport) -> Table:
    """What `report.sae` says besides measures."""
    names = {*_MEASURES, *_measured(report.sae)}
    return facts_table("Description", {key: value for key, value in report.sae.items() if key not in names})


def facts_table(caption: str, facts: Mapping[str, Any]) -> Table:
    """Any mapping, one row a key."""
    rows = tuple((Cell(str(key)), Cell(plain(value))) for key, value in facts.items())
    return Table(caption, (Column("name", kind="text"), Column("value", kind="text")), rows)


def _measured(sae: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    if "fvu" in sae:
        return {"value": sae}
    return {str(key): value for key, value in sae.items() if isinstance(value, Mapping) and "fvu" in value}


def _measure_cell(key: str, values: Mapping[str, Any]) -> Cell:
    value, low, high = (values.get(name) for name in (key, f"{key}_low", f"{key}_high"))
    if value is None:
        return Cell(NONE)
    if low is not None and high is not None:
        return interval_cell(value, low, high)
    if key in ("dead", "dense"):
        return Cell(percent(value), sort=value)
    if key.startswith("n_"):
        return count_cell(value)
    return Cell(number(float(value), 1 if key == "l0" else 3), sort=value)


def _standard_errors(difference: Estimate | None) -> Cell:
    if difference is None or not difference.se:
        return Cell(NONE)
    value = difference.mean / difference.se
    return Cell(number(value, 1, signed=True), sort=value)


def _estimate_cell(value: Estimate | None, *, signed: bool = False) -> Cell:
    if value is None:
        return Cell(NONE)
    return interval_cell(value.mean, value.low, value.high, signed=signed)


def interval_cell(mean: float, low: float | None, high: float | None, *, signed: bool = False) -> Cell:
    """A mean with its interval."""
    return Cell(*interval(mean, low, high, signed=signed), sort=mean)


def count_cell(value: int) -> Cell:
    """A whole number."""
    return Cell(f"{value:,}", sort=value)


def token_cell(tokens: Sequence[str]) -> Cell:
    """Tokens, their white space shown."""
    return Cell(tokens=tuple(map(token, tokens)))
