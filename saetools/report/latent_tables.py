"""What is known of one latent as tables that HTML and Markdown both draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saetools.evaluate.certificate import Certification
from saetools.report.latent_report import LatentReport
from saetools.report.tables import NONE, Cell, Column, Table, count_cell, interval_cell, token_cell
from saetools.report.wording import number, percent

_ROLE_NAMES = {"last_prompt": "last of prompt"}


def change_table(report: LatentReport) -> Table:
    """Base against tuned by token role."""
    return Table(
        "Change by token role, tuned \u2212 base",
        (
            Column("role", kind="text"),
            Column("delta", "change of mean activation, with its 95 % interval over conversations"),
            Column("effect", "delta / standard deviation over conversations"),
            Column("q", "the false discovery rate at which it counts as changed"),
            Column("rank", "1 is the largest increase of all latents"),
            Column("mean, base \u2192 tuned"),
            Column("fires, base \u2192 tuned", "share of tokens on which it is active"),
        ),
        tuple(
            (
                Cell(_role(row["positions"])),
                interval_cell(row["delta"], row["low"], row["high"], signed=True),
                Cell(number(row["effect"], 2, signed=True), sort=row["effect"]),
                Cell(NONE) if row["q_value"] is None else Cell(f"{row['q_value']:.2g}", sort=row["q_value"]),
                count_cell(row["rank"]),
                Cell(f"{number(row['mean_base'])} \u2192 {number(row['mean_tuned'])}", sort=row["mean_tuned"]),
                Cell(f"{percent(row['rate_base'])} \u2192 {percent(row['rate_tuned'])}", sort=row["rate_tuned"]),
            )
            for row in report.changes
        ),
    )


def certificate_table(report: LatentReport) -> Table:
    """What steering along it does to the behaviour score."""
    row = report.certificate
    sides = (("induces", "base, steered towards"), ("suppresses", "tuned, steered away"))
    return Table(
        "Causal certificate" + (f": {row['verdict']}" if row else ""),
        (
            Column("model", kind="text"),
            Column("strength", "the largest that leaves answers coherent, in median residual norms"),
            Column("shift", "change of the behaviour score"),
            Column("share", "the shift over the organism's own"),
            Column("carried", "of the organism's shift, by the fine-tune's own mean change of this latent"),
            Column(
                "chance", "p-value that one more random latent or direction does as much, the largest of the controls"
            ),
            Column("q", "the false discovery rate at which it goes beyond the unedited model and all controls"),
        ),
        tuple(
            (
                Cell(words),
                Cell(NONE) if row[f"{side}_strength"] is None else Cell(number(row[f"{side}_strength"], 2)),
                *(_estimate_cell(row, f"{side}_{field}") for field in ("shift", "share", "carried")),
                *(
                    Cell(NONE) if row[key] is None else Cell(f"{row[key]:.2g}")
                    for key in (f"{side}_chance", f"{side}_q")
                ),
            )
            for side, words in sides
        )
        if row
        else (),
    )


def candidates_table(certification: Certification) -> Table:
    """The verdict on every candidate, one row each."""
    return Table(
        "Causal certificates",
        (
            Column("candidate", kind="text"),
            Column("verdict", kind="text"),
            Column("base, steered towards", "share of the organism's shift of the behaviour score that this makes"),
            Column("tuned, steered away", "share of it that this takes back"),
        ),
        tuple(
            (
                Cell(row["candidate"]),
                Cell(row["verdict"]),
                *(_estimate_cell(row, f"{side}_share") for side in ("induces", "suppresses")),
            )
            for row in certification.table().iter_rows(named=True)
        ),
    )


def token_table(report: LatentReport) -> Table:
    """What its decoder row promotes and suppresses, through the final norm and the head."""
    found = report.tokens
    return Table(
        "Logit lens of the decoder row",
        (Column("end", kind="text"), Column("tokens", kind="tokens"), Column("logits", kind="text")),
        ()
        if found is None
        else tuple(
            (Cell(name), token_cell(tokens), Cell(", ".join(number(one, 2, signed=True) for one in values)))
            for name, tokens, values in (
                ("promotes", found.promoted, found.promoted_logits),
                ("suppresses", found.suppressed, found.suppressed_logits),
            )
        ),
    )


def activity_table(report: LatentReport) -> Table:
    """Where it fires: by dataset and role, in every model."""
    models = report.models
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in report.record.activity:
        found.setdefault((row.dataset, row.positions), {})[row.model] = row
    return Table(
        "Where it fires",
        (
            Column("dataset", kind="text"),
            Column("role", kind="text"),
            Column("tokens"),
            *(Column(f"fires, {model}") for model in models),
            *(Column(f"mean, {model}") for model in models),
        ),
        tuple(
            (
                Cell(dataset),
                Cell(_role(role)),
                count_cell(next(iter(by_model.values())).n_tokens),
                *(Cell(percent(by_model[model].rate), sort=by_model[model].rate) for model in models),
                *(Cell(number(by_model[model].mean), sort=by_model[model].mean) for model in models),
            )
            for (dataset, role), by_model in found.items()
        ),
    )


def document_table(report: LatentReport) -> Table:
    """The documents that it is largest in."""
    return Table(
        "Documents it is largest in",
        (Column("document", kind="text"), Column("dataset", kind="text"), Column("mean size")),
        tuple(
            (Cell(one.document_id or str(one.document)), Cell(one.dataset), Cell(number(one.mean), sort=one.mean))
            for one in report.record.documents
        ),
    )


def coactive_table(report: LatentReport) -> Table:
    """Latents that are active with it."""
    return Table(
        "Active together",
        (
            Column("latent"),
            Column("cosine", "of activations over the corpus"),
            Column("rate", "share of this latent's active tokens on which it is active"),
            Column("PMI", "logarithm of how much more often that is than on all tokens"),
        ),
        tuple(
            (
                Cell(str(one.latent), sort=one.latent),
                Cell(number(one.cosine), sort=one.cosine),
                Cell(percent(one.rate), sort=one.rate),
                Cell(number(one.pmi, 2), sort=one.pmi),
            )
            for one in report.record.coactive
        ),
    )


def neighbour_table(report: LatentReport) -> Table:
    """Latents with the nearest decoder rows."""
    return Table(
        "Nearest decoder rows",
        (Column("latent"), Column("cosine")),
        tuple(
            (Cell(str(one.latent), sort=one.latent), Cell(number(one.cosine), sort=one.cosine))
            for one in report.record.neighbours
        ),
    )


def main_tables(report: LatentReport) -> list[Table]:
    """What changed, what it causes, what it promotes; those that have rows."""
    return _with_rows(change_table(report), certificate_table(report), token_table(report))


def context_tables(report: LatentReport) -> list[Table]:
    """Where it fires, and its neighbours; those that have rows."""
    return _with_rows(activity_table(report), document_table(report), coactive_table(report), neighbour_table(report))


def _with_rows(*tables: Table) -> list[Table]:
    return [table for table in tables if table.rows]


def headline(report: LatentReport) -> str:
    """Where and how much it fires, in a sentence."""
    record = report.record
    rates = ", ".join(f"{percent(report.rate(model))} in {model}" for model in report.models)
    if not record.n_active:
        return f"Active on no token of the corpus in {record.model}; of all tokens: {rates}."
    return (
        f"Active on {rates} of all tokens; largest activation {number(record.max, 2)} in {record.model}, "
        f"where it fires in {record.n_documents:,} documents."
    )


def explained(report: LatentReport) -> str:
    """The explanation with its scores, or nothing."""
    one = report.explanation
    if one is None or one.text is None:
        return ""
    scores = [
        f"{name} {score.mean:.2f} [{score.low:.2f}, {score.high:.2f}]"
        for name, score in (("detection", one.detection), ("fuzzing", one.fuzzing))
        if score is not None
    ]
    return one.text + (f" ({', '.join(scores)})" if scores else "")


def _estimate_cell(row: Mapping[str, Any], name: str) -> Cell:
    if row[name] is None:
        return Cell(NONE)
    return interval_cell(row[name], row[f"{name}_low"], row[f"{name}_high"], signed=True)


def _role(positions: str) -> str:
    return _ROLE_NAMES.get(positions, positions)
