"""Many edits at many strengths in one batched generation, with a guard: which answers are still language.

For finding how strongly to steer, and for comparing latents, before behaviour is measured. All edits, strengths,
prompts and samples are rows of shared batches, and each row's answer is the one it would get alone. A score of
behaviour beside random controls is another matter: `dose_response`, `certify_latents`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saetools.data.conversation import Conversation
from saetools.errors import InputError
from saetools.evaluate.cells import Cells
from saetools.evaluate.coherence import AnswerCoherence, CoherenceLimits, Judge, largest_coherent, measure_coherence
from saetools.evaluate.judge import described_judge
from saetools.generation import Job, SamplingConfig, generate_batches
from saetools.models.editing import Edits, written_edits
from saetools.models.language_model import LanguageModel
from saetools.provenance import sha256_of_texts, versions
from saetools.saved_result import load_result, save_result
from saetools.steer.identity import edits_sha256

if TYPE_CHECKING:
    import polars as pl

_CELLS = "answers.jsonl"
UNEDITED = "unedited"
"""How a sweep calls the model without an edit."""


@dataclass(frozen=True)
class SweepConfig:
    """Settings of a sweep."""

    max_new_tokens: int = 48
    """Length of the answers."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    n_samples: int = 1
    """Answers to each prompt, of which each has a random stream of its own, the same under all edits."""
    batch_rows: int = 72
    """Answers generated together."""
    seed: int = 0
    """Of the answers."""
    max_incoherent: float = 0.1
    """Largest share of incoherent answers (arXiv 2506.19823), or that of the unedited model where it is larger."""
    perplexity_factor: float = 2.0
    """An answer is incoherent if its perplexity under the base is more than so many times that of the least likely of
    twenty answers of the unedited model,"""
    max_repetition: float = 0.5
    """or a larger share of its trigrams repeats (and more than in one of twenty unedited answers),"""
    min_judged: float = 50.0
    """or a judge, if there is one, gives it less."""
    max_minutes: float | None = None
    """Begin no batch after so long; answers left are missing from the result."""
    max_tokens: int | None = None
    """Begin no batch after so many generated tokens."""

    def __post_init__(self) -> None:
        self.sampling  # noqa: B018 - checks what it is made of
        for name, good, expected in (
            ("max_incoherent", 0 <= self.max_incoherent <= 1, "0 to 1"),
            ("max_repetition", 0 <= self.max_repetition <= 1, "0 to 1"),
            ("perplexity_factor", 0 < self.perplexity_factor < math.inf, "above 0"),
        ):
            if not good:
                raise InputError(name, expected=expected, received=getattr(self, name), remedy="pick another")

    @property
    def sampling(self) -> SamplingConfig:
        """How answers are drawn."""
        return SamplingConfig(
            self.max_new_tokens,
            self.temperature,
            n_samples=self.n_samples,
            seed=self.seed,
            batch_rows=self.batch_rows,
        )


@dataclass(frozen=True)
class Sweep:
    """Answers under every edit at every strength, and how coherent they are.

    Args:
        answers: one row an answer: `edit`, `strength` (0 and `unedited` without an edit), `prompt`, `sample`, `text`,
            `n_tokens`, `finished`, `broken` (the model's output became infinite), `surprise`, `repetition`, `refused`,
            `language`, `judged`, `coherent`.
        edits: how each edit is written, at each strength.
        most_incoherent: the share of incoherent answers that is borne.
        warnings: what stands in the way of reading it, if anything.
        settings: how it was made.
        provenance: models, prompts, versions.
    """

    answers: pl.DataFrame
    edits: Mapping[str, Mapping[float, str]]
    most_incoherent: float
    warnings: tuple[str, ...]
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def doses(self) -> pl.DataFrame:
        """One row an edit and strength: answers, and what share of them is incoherent, refuses or changes language.

        Columns: `edit`, `strength`, `n`, `incoherent`, `surprise` and `repetition` (means), `refused`, `other_language`
        (another than the unedited answer to the same prompt, where both are clear), `judged` (mean) and `n_judged`.
        """
        import polars as pl

        own = self.answers.filter(pl.col("edit") == UNEDITED).select("prompt", "sample", plain="language")
        table = self.answers.join(own, on=["prompt", "sample"], how="left")
        return (
            table.group_by("edit", "strength", maintain_order=True)
            .agg(
                pl.len().alias("n"),
                (1 - pl.col("coherent").mean()).alias("incoherent"),
                pl.col("surprise").mean(),
                pl.col("repetition").mean(),
                pl.col("refused").mean(),
                (pl.col("language") != pl.col("plain")).fill_null(value=False).mean().alias("other_language"),
                pl.col("judged").mean(),
                pl.col("judged").count().alias("n_judged"),
            )
            .sort("edit", "strength")
        )

    def max_coherent_strength(self, edit: str) -> float:
        """The largest strength of an edit up to which answers are coherent; 0 if not even the smallest leaves them so.

        Raises:
            InputError: for an edit that is not in the sweep.
        """
        return self.coherent_strengths(edit)[0]

    def save(self, path: str | Path) -> Path:
        """Write a folder: `answers.parquet` and `sweep.json`.

        Raises:
            ResourceError: if disk space runs out.
        """
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "answers"}
        facts["edits"] = {name: list(each.items()) for name, each in self.edits.items()}
        return save_result(path, "sweep", {"answers": self.answers}, facts)

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        """Read what `save` wrote.

        Raises:
            InputError: if the folder holds no sweep.
            IntegrityError: if a file is damaged, or not the one that was saved.
        """
        (answers,), facts, _ = load_result(path, "sweep", ["answers"])
        edits = {name: {float(strength): text for strength, text in each} for name, each in facts["edits"].items()}
        return cls(**{**facts, "answers": answers, "edits": edits, "warnings": tuple(facts["warnings"])})

    def coherent_strengths(self, edit: str) -> tuple[float, float | None]:
        """The largest strength up to which answers are coherent, and the one to try next (`largest_coherent`).

        Raises:
            InputError: for an edit that is not in the sweep.
        """
        import polars as pl

        doses = self.doses().filter((pl.col("edit") == edit) & (pl.col("edit") != UNEDITED))
        if not len(doses):
            raise InputError(
                "edit", expected="one of " + ", ".join(self.edits), received=repr(edit), remedy="pick one of these"
            )
        return largest_coherent(dict(doses.select("strength", "incoherent").iter_rows()), self.most_incoherent)


def sweep_edits(
    lm: LanguageModel,
    edits: Mapping[str, Mapping[float, Edits]],
    prompts: Sequence[Conversation | str],
    *,
    base: LanguageModel | None = None,
    config: SweepConfig = SweepConfig(),
    judge: Judge | None = None,
    out: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Answer prompts under every edit at every strength, beside the unedited model, and see what is coherent.

    Args:
        lm: the model that is steered.
        edits: by name, and then by strength: `{"latent 3": {s: {site: steer.add(sae, 3, s)} for s in (0.1, 0.2)}}`.
        prompts: what is asked.
        base: says how likely answers are; by default the model without its adapter.
        config: settings.
        judge: scores the coherence of answers, such as `coherence_judge(endpoint)`.
        out: folder for what is done so far; a run that was killed, or whose budget was spent, goes on there.
        on_progress: called with answers done and in all.

    Raises:
        InputError: for no edits, an edit called `unedited`, or a folder of another run.

    Example:
        >>> v = torch.randn(576, generator=torch.Generator().manual_seed(0))
        >>> pushes = {s: {Site(15): steer.add_direction(v, s)} for s in (1.0, 2.0)}
        >>> sweep = sweep_edits(lm, {"random": pushes}, ["Say hi."], config=SweepConfig(max_new_tokens=8))
        >>> sweep.doses().select("edit", "strength", "n").rows()
        [('random', 1.0, 1), ('random', 2.0, 1), ('unedited', 0.0, 1)]
    """
    run = _Run(lm, edits, prompts, base or lm.base, config, judge, out, on_progress)
    run.answer(edits)
    return run.result()


def max_coherent_strength(
    lm: LanguageModel,
    edit_at: Callable[[float], Edits],
    prompts: Sequence[Conversation | str],
    *,
    strengths: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5),
    n_refine: int = 3,
    base: LanguageModel | None = None,
    config: SweepConfig = SweepConfig(),
    judge: Judge | None = None,
    out: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[float, Sweep]:
    """Search the largest strength of an edit that leaves answers coherent.

    All strengths first, in one batch; then halfway between the last coherent one and the next, again and again.

    Args:
        lm: the model that is steered.
        edit_at: makes the edit of a strength.
        prompts: what is asked.
        strengths: to begin with; all above 0, or all below.
        n_refine: halvings of the gap.
        base: as of `sweep_edits`.
        config: settings.
        judge: as of `sweep_edits`.
        out: as of `sweep_edits`.
        on_progress: as of `sweep_edits`, for each round.

    Returns:
        The strength, 0 if not even the smallest leaves answers coherent; and everything that was tried, as a sweep of
        an edit called `edit`.

    Raises:
        InputError: for no strengths, for 0, or for strengths of both signs.

    Example:
        >>> v = torch.randn(576, generator=torch.Generator().manual_seed(0))
        >>> config = SweepConfig(max_new_tokens=8, temperature=0.0)
        >>> found, _ = max_coherent_strength(
        ...     lm, lambda s: {Site(15): steer.add_direction(v, s)}, ["Hi."], strengths=(0.01, 1000.0), config=config
        ... )
        >>> 0.01 <= found < 1000
        True
    """
    largest_coherent(dict.fromkeys(strengths, 0.0), 1.0)  # checks them
    doses = {float(strength): edit_at(strength) for strength in sorted(strengths)}
    run = _Run(lm, {"edit": doses}, prompts, base or lm.base, config, judge, out, on_progress)
    run.answer({"edit": doses})
    for _ in range(n_refine):
        _, strength = run.result().coherent_strengths("edit")
        if strength is None or strength in doses:
            break
        doses[strength] = edit_at(strength)
        run.answer({"edit": {strength: doses[strength]}})
    sweep = run.result()
    return sweep.max_coherent_strength("edit"), sweep


class _Run:
    """Answers that are kept as soon as they are there."""

    def __init__(
        self,
        lm: LanguageModel,
        edits: Mapping[str, Mapping[float, Edits]],
        prompts: Sequence[Conversation | str],
        base: LanguageModel,
        config: SweepConfig,
        judge: Judge | None,
        out: str | Path | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        if not edits or UNEDITED in edits or not all(edits.values()):
            raise InputError(
                "edits",
                expected=f"edits by strength, by names other than {UNEDITED!r}",
                received=", ".join(map(repr, edits)) or "none",
                remedy="name at least one, with a strength",
            )
        self._lm, self._base, self._prompts, self._judge = lm, base, prompts, judge
        self._config, self._on_progress = config, on_progress
        conversations = [Conversation.chat(one) if isinstance(one, str) else one for one in prompts]
        asked = [json.dumps([(m.role, m.content) for m in one.messages]) for one in conversations]
        self._provenance = {
            "model": lm.describe(),
            "base": base.describe(),
            "prompts_sha256": sha256_of_texts(asked),
            "judge": described_judge(judge),
            "versions": versions(),
        }
        drawing = {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "seed")}
        path = None if out is None else Path(out) / _CELLS
        self._cells = Cells(path, self._provenance | drawing)
        self._variants: dict[str, tuple[str, float]] = {UNEDITED: (UNEDITED, 0.0)}
        self._texts: dict[str, dict[float, str]] = {}
        self._started, self._n_tokens, self._saes = time.monotonic(), 0, dict[int, str]()

    def answer(self, edits: Mapping[str, Mapping[float, Edits]]) -> None:
        """Generate what is not there yet."""
        variants: dict[str, Edits | None] = {UNEDITED: None}
        for name, doses in edits.items():
            for strength, each in doses.items():
                variant = f"{name} {float(strength)!r} {edits_sha256(each, known=self._saes)[:16]}"
                variants[variant] = each
                self._variants[variant] = name, float(strength)
                self._texts.setdefault(name, {})[float(strength)] = written_edits(each)
        jobs = [
            (prompt, variant, sample)
            for prompt in range(len(self._prompts))
            for variant in variants
            for sample in range(self._config.n_samples)
        ]
        known = {job for job in jobs if _key(job) in self._cells}
        done = len(known)
        batches = generate_batches(self._lm, self._prompts, variants, self._config.sampling, skip=known)
        while self._may_go_on() and (some := next(batches, None)) is not None:
            signs = measure_coherence(self._base, self._prompts, some, judge=self._judge)
            self._cells.add(
                {
                    _key((one.prompt, one.variant, one.sample)): [
                        one.text,
                        len(one.token_ids),
                        one.finished,
                        one.broken,
                        *dataclasses.astuple(sign),
                    ]
                    for one, sign in zip(some, signs, strict=True)
                }
            )
            self._n_tokens += sum(len(one.token_ids) for one in some)
            done += len(some)
            if self._on_progress is not None:
                self._on_progress(done, len(jobs))

    def result(self) -> Sweep:
        """Everything that is there."""
        import polars as pl

        rows, n_missing = [], 0
        for variant, (edit, strength) in self._variants.items():
            for prompt in range(len(self._prompts)):
                for sample in range(self._config.n_samples):
                    if (key := _key((prompt, variant, sample))) not in self._cells:
                        n_missing += 1
                        continue
                    text, n_tokens, finished, broken, *signs = self._cells[key]
                    facts = {"text": text, "n_tokens": n_tokens, "finished": finished, "broken": broken}
                    place = {"edit": edit, "strength": strength, "prompt": prompt, "sample": sample}
                    rows.append(place | facts | dataclasses.asdict(AnswerCoherence(*signs)))
        own = [_signs(row) for row in rows if row["edit"] == UNEDITED]
        if not own:
            raise InputError(
                "max_minutes", expected="time for a first batch", received="none was made", remedy="raise the budget"
            )
        config = self._config
        limits = CoherenceLimits.of(
            own,
            perplexity_factor=config.perplexity_factor,
            max_repetition=config.max_repetition,
            min_judged=config.min_judged,
        )
        said = (f"the budget is spent: {n_missing} answers are missing",) if n_missing else ()
        coherent = [{"coherent": limits.holds(_signs(row)) and not row["broken"]} for row in rows]
        return Sweep(
            pl.DataFrame([row | one for row, one in zip(rows, coherent, strict=True)], infer_schema_length=None),
            {name: dict(each) for name, each in self._texts.items()},
            max(config.max_incoherent, limits.incoherent(own)),
            said,
            dataclasses.asdict(config),
            self._provenance,
        )

    def _may_go_on(self) -> bool:
        minutes, tokens = self._config.max_minutes, self._config.max_tokens
        in_time = minutes is None or time.monotonic() - self._started <= 60 * minutes
        return in_time and (tokens is None or self._n_tokens <= tokens)


def _key(job: Job) -> str:
    prompt, variant, sample = job
    return f"{prompt}/{sample}/{variant}"


def _signs(row: Mapping[str, Any]) -> AnswerCoherence:
    return AnswerCoherence(**{field.name: row[field.name] for field in dataclasses.fields(AnswerCoherence)})
