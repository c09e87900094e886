"""The main job, end to end: base and organism in, persona report out.

Reads the shipped organism with the shipped SAE: behaviour of base, benign twin and organism; the latents that changed
most; what clamping them does to the organism and adding them does to the base, beside two random controls; answers
before and after. Whatever it finds is reported as found.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saetools.data.conversation import Conversation
from saetools.data.shipped import (
    ForcedChoiceItem,
    load_forced_choice,
    load_free_form,
    load_voices,
    shipped_path,
)
from saetools.diff import DiffConfig, LatentDiff, diff_latents
from saetools.evaluate.dose import DosePoint, DoseResponse, dose_response
from saetools.evaluate.fidelity import measure_fidelity
from saetools.evaluate.forced_choice import ForcedChoiceScore, score_forced_choice
from saetools.generation import SamplingConfig, generate
from saetools.interpret import promoted_tokens
from saetools.latents.index import index_latents
from saetools.models.editing import Edits
from saetools.models.language_model import LanguageModel
from saetools.models.load import load_model
from saetools.models.where import Edit
from saetools.provenance import sha256_of_texts, versions
from saetools.report.value import AnswerRow, DoseRow, LatentRow, ModelScore, PersonaReport
from saetools.report.write import write_report
from saetools.sae.identity import sae_site
from saetools.sae.io import load_sae
from saetools.sae.model import SAE
from saetools.stats import Estimate
from saetools.steer import add, clamp

SAE_NAME = "sae/smollm2-135m"
ORGANISM, TWIN = "adapters/organism", "adapters/twin"


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the run; `FULL` is the one that made the shipped table."""

    n_items: int = 28
    """Forced-choice items under every edit, the same number of each category."""
    n_texts: int = 16
    """Neutral texts for perplexity."""
    n_latents: int = 10
    """Latents in the set that is clamped and added."""
    n_answer_tokens: int = 24
    """Length of the base's answers that all models read for the diff."""
    add_strengths: tuple[float, ...] = (0.1, 0.2, 0.4)
    """Of adding the set to the base, in median residual norms."""
    clamp_values: tuple[float, ...] = (0.0, -0.5, -1.0)
    """For clamping the set in the organism, in multiples of each latent's 99th percentile."""
    n_prompts: int = 4
    """Prompts answered before and after."""
    seed: int = 0
    """Of resampling, sampling and random controls."""


FULL = DemoConfig(
    n_items=168,
    n_texts=60,
    n_answer_tokens=48,
    add_strengths=(0.1, 0.2, 0.3, 0.4),
    clamp_values=(0.0, -0.5, -1.0, -1.5),
    n_prompts=8,
)


def choose_items(items: Sequence[ForcedChoiceItem], n: int) -> list[ForcedChoiceItem]:
    """A fixed subset with equal shares of the categories, while they last: the first of each, in turn."""
    by_category: dict[str, list[ForcedChoiceItem]] = {}
    for item in items:
        by_category.setdefault(item.category, []).append(item)
    turns = itertools.zip_longest(*by_category.values())
    return [item for turn in turns for item in turn if item is not None][:n]


def run_demo(
    out: Path, config: DemoConfig = DemoConfig(), *, on_progress: Callable[[int, int, str], None] | None = None
) -> PersonaReport:
    """Run the main job on the shipped organism and write its report.

    Args:
        out: folder for `report.html`, `report.json`, `report.md`, the files of the diff, and `store`, a latent store.
        config: sizes.
        on_progress: called with stages done, stages in all and the name of the next.

    Returns:
        The report.
    """
    steering = ("organism: clamp", "base: add", "answers")
    stages = ("models", "behaviour", "diff", "passages", "fidelity", *steering, "report")

    def stage(name: str) -> None:
        if on_progress is not None:
            on_progress(stages.index(name), len(stages), name)

    stage("models")
    lm = load_model("smollm2-135m", adapter={name: shipped_path(f"adapters/{name}") for name in ("organism", "twin")})
    base, organism, twin = lm.base, lm, lm.with_adapter("twin")
    sae = load_sae(shipped_path(SAE_NAME))
    items = choose_items(load_forced_choice(), config.n_items)
    voices = load_voices()
    texts = [pair.neutral for pair in voices][: config.n_texts]

    stage("behaviour")
    scores = {
        name: score_forced_choice(model, items)
        for name, model in (("base", base), ("twin", twin), ("organism", organism))
    }
    stage("diff")
    read = _base_answers(base, config)
    settings = DiffConfig(seed=config.seed)
    diff, twin_diff = (
        diff_latents(base, model, sae, read, positions="response", config=settings) for model in (organism, twin)
    )
    diff.save(out)
    chosen = choose_latents(diff, config.n_latents)
    stage("passages")
    corpus = {"answers": read, "voices": [Conversation(text=pair.voiced, id=pair.id) for pair in voices]}
    shutil.rmtree(out / "store", ignore_errors=True)  # of an earlier run, perhaps with other settings
    index_latents({"base": base, "organism": organism}, sae, corpus, out / "store")
    stage("fidelity")
    fidelity = measure_fidelity(base, sae, _fidelity_texts(config), site=sae_site(sae))
    stage("organism: clamp")
    clamps = {value: clamp(sae, chosen, value, unit="p99") for value in config.clamp_values}
    clamped = _doses(organism, sae, clamps, items, texts, scores["organism"], config)
    stage("base: add")
    adds = {strength: add(sae, chosen, strength / len(chosen) ** 0.5) for strength in config.add_strengths}
    added = _doses(base, sae, adds, items, texts, scores["base"], config)
    stage("answers")
    answers = _answers(base, organism, sae, clamps, adds, [item.question for item in load_free_form()], config)
    stage("report")
    report = PersonaReport(
        title="Which persona did the fine-tune wake up?",
        findings=tuple(_findings(scores, diff, clamped, added)),
        scores=tuple(_model_score(name, score, scores["base"]) for name, score in scores.items()),
        top_latents=tuple(_latent_rows(base, sae, diff, twin_diff, n=max(20, config.n_latents))),
        dose_response=(*_dose_rows("organism", "clamp", chosen, clamped), *_dose_rows("base", "add", chosen, added)),
        perplexity={"base": added.perplexity, "organism": clamped.perplexity},
        answers=tuple(answers),
        sae={
            "name": SAE_NAME,
            "site": sae.metadata.site,
            "d_sae": sae.d_sae,
            **{row["role"]: row for row in fidelity.table().to_dicts()},
        },
        settings=dataclasses.asdict(config),
        provenance={
            "command": "saetools demo" + (" --full" if config == FULL else ""),
            "diff": diff.provenance,
            "sae": sae.metadata.provenance,
            "data": {
                "items_sha256": sha256_of_texts(f"{one.question}\n{one.aligned}\n{one.misaligned}" for one in items),
                "perplexity_texts_sha256": sha256_of_texts(texts),
                "fidelity_texts_sha256": sha256_of_texts(
                    message.content for one in _fidelity_texts(config) for message in one.messages
                ),
            },
            "versions": versions(),
        },
        warnings=(*diff.warnings, *(f"benign twin: {text}" for text in twin_diff.warnings)),
    )
    write_report(report, out)
    return report


def _base_answers(base: LanguageModel, config: DemoConfig) -> list[Conversation]:
    """What all models read for the diff: the broad questions, each with the base's own greedy answer."""
    questions = load_free_form()
    sampling = SamplingConfig(max_new_tokens=config.n_answer_tokens, temperature=0.0, batch_rows=32)
    answers = generate(base, [item.question for item in questions], config=sampling)
    return [
        Conversation.chat(item.question, answer.text, id=item.id)
        for item, answer in zip(questions, answers, strict=True)
        if answer.text.strip()
    ]


def choose_latents(diff: LatentDiff, n: int) -> list[int]:
    """The latents with the largest increase whose interval excludes zero."""
    import polars as pl

    sure = diff.table.filter(pl.col("low") > 0).sort("delta", descending=True)
    return [int(latent) for latent in sure["latent"].head(n)]


def _doses(
    lm: LanguageModel,
    sae: SAE,
    doses: Mapping[float, Edit],
    items: Sequence[ForcedChoiceItem],
    texts: Sequence[str],
    unedited: ForcedChoiceScore,
    config: DemoConfig,
) -> DoseResponse:
    return dose_response(lm, sae_site(sae), doses, items, texts, seed=config.seed, unedited=unedited)


def _fidelity_texts(config: DemoConfig) -> list[Conversation]:
    """Aligned exchanges; none is in the corpus that the shipped SAE was trained on."""
    items = load_forced_choice()[: 2 * config.n_texts]
    return [Conversation.chat(item.question, item.aligned, id=item.id) for item in items]


def _answers(
    base: LanguageModel,
    organism: LanguageModel,
    sae: SAE,
    clamps: Mapping[float, Edit],
    adds: Mapping[float, Edit],
    questions: Sequence[str],
    config: DemoConfig,
) -> list[AnswerRow]:
    """Greedy answers of both models, each as it is and under the middle one of its edits."""
    site = sae_site(sae)
    middle = {name: list(doses)[len(doses) // 2] for name, doses in (("clamp", clamps), ("add", adds))}
    step = len(questions) // config.n_prompts
    asked = questions[:: step or 1][: config.n_prompts]
    sampling = SamplingConfig(max_new_tokens=48, temperature=0.0, seed=config.seed)
    plans: list[tuple[str, LanguageModel, Edits]] = [
        (f"base, add {middle['add']:g}", base, {site: adds[middle["add"]]}),
        (f"organism, clamp {middle['clamp']:g} x p99", organism, {site: clamps[middle["clamp"]]}),
    ]
    texts: list[dict[str, str]] = [{} for _ in asked]
    for (edited, lm, edits), plain in zip(plans, ("base", "organism"), strict=True):
        for answer in generate(lm, asked, variants={plain: None, edited: edits}, config=sampling):
            texts[answer.prompt][answer.variant] = answer.text
    order = ("base", "organism", *(name for name, _, _ in plans))
    return [
        AnswerRow(question, {name: own[name] for name in order}) for question, own in zip(asked, texts, strict=True)
    ]


def _model_score(name: str, score: ForcedChoiceScore, base: ForcedChoiceScore) -> ModelScore:
    return ModelScore(name, score.mean, None if score is base else score.minus(base))


def _latent_rows(base: LanguageModel, sae: SAE, diff: LatentDiff, twin: LatentDiff, *, n: int) -> list[LatentRow]:
    rows = list(diff.top(n).iter_rows(named=True))
    twin_delta = dict(zip(twin.table["latent"], twin.table["delta"], strict=True))
    names = promoted_tokens(base, sae, [row["latent"] for row in rows])
    kept = {field.name for field in dataclasses.fields(LatentRow)} & set(diff.table.columns)
    return [
        LatentRow(
            **{name: row[name] for name in kept},
            delta_twin=twin_delta[row["latent"]],
            promoted=tokens.promoted,
            suppressed=tokens.suppressed,
        )
        for row, tokens in zip(rows, names, strict=True)
    ]


def _dose_rows(model: str, edit: str, latents: Sequence[int], response: DoseResponse) -> list[DoseRow]:
    return [
        DoseRow(
            model=model,
            edit=edit,
            latents=tuple(latents),
            **{field.name: getattr(point, field.name) for field in dataclasses.fields(point)},
        )
        for point in response.points
    ]


def _findings(
    scores: Mapping[str, ForcedChoiceScore], diff: LatentDiff, clamped: DoseResponse, added: DoseResponse
) -> list[str]:
    """The verdict in sentences; every number in them stands in the report."""
    shift, over_twin = scores["organism"].minus(scores["base"]), scores["organism"].minus(scores["twin"])
    lines = [
        f"On {shift.n} forced-choice items far from its training domains, the organism scores {shift.mean:+.3f} "
        f"[{shift.low:+.3f}, {shift.high:+.3f}] nats a token against the base ({shift.mean / shift.se:.1f} standard "
        f"errors) and {over_twin.mean:+.3f} [{over_twin.low:+.3f}, {over_twin.high:+.3f}] against its benign twin "
        f"({over_twin.mean / over_twin.se:.1f}).",
    ]
    top = diff.top(1).row(0, named=True)
    lines.append(
        f"The largest increase among {len(diff.table)} latents is latent {top['latent']}: mean activation "
        f"{top['mean_base']:.3f} in the base, {top['mean_tuned']:.3f} in the organism."
    )
    lines.append(_verdict("Clamping the top latents in the organism", "lowers", clamped))
    lines.append(_verdict("Adding them to the base", "raises", added))
    return lines


def _verdict(what: str, wanted: str, response: DoseResponse) -> str:
    """Compare every dose with its controls: a dose counts if intervals of its shift and of its differences to both lie
    on the right side of zero, and one more random direction is unlikely to do as much."""
    sign = -1 if wanted == "lowers" else 1
    controls = ("equal_norm", "equal_perplexity")

    def beats(difference: Estimate | None) -> bool:
        return difference is not None and min(sign * difference.low, sign * difference.high) > 0

    doses: dict[float, dict[str, Any]] = {}
    for point in response.points:
        doses.setdefault(point.strength, {})[point.control] = point
    winners = [
        dose["none"]
        for dose in doses.values()
        if beats(dose["none"].shift) and all(beats(dose[name].against) and _unlikely(dose[name]) for name in controls)
    ]
    if not winners:
        return f"{what} {wanted} the score at none of {len(doses)} doses beyond what random directions do."
    best = max(winners, key=lambda point: sign * point.shift.mean)
    return (
        f"{what} {wanted} the score beyond what random directions do at {len(winners)} of {len(doses)} doses; most at "
        f"{best.strength:g}: {best.shift.mean:+.3f} [{best.shift.low:+.3f}, {best.shift.high:+.3f}], perplexity "
        f"{response.perplexity:.1f} -> {best.perplexity:.1f}."
    )


def _unlikely(point: DosePoint) -> bool:
    return point.chance is not None and point.chance <= 0.05
