"""Two readings of a fine-tune: does a latent change because the model reads otherwise, or because it writes otherwise?

Each model answers the same prompts, and both models then read both sets of answers. A latent's total change - the
tuned model on its own answers against the base on its own - splits exactly into

    representation = mean over both texts of f(tuned, text) - f(base, text)
    content        = mean over both models of f(model, tuned's text) - f(model, base's text)

A latent that moves by content alone may say no more than that the answers are about something else. Use it when the
fine-tune changes what the model says; on text that both read, `diff_latents` gives the representation alone.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.changes import change_figures, change_tests, projection_share, ranks
from saetools.data.conversation import Conversation, Message
from saetools.data.roles import Positions, select_positions
from saetools.data.tokenizing import TokenizedConversation, TokenizeReport, tokenize, tokens_sha256
from saetools.diff import DiffConfig, check_diff, read_both
from saetools.errors import InputError, SaetoolsWarning
from saetools.generation import SamplingConfig, generate
from saetools.latent_diff import in_brackets, untested
from saetools.latent_scatter import scatter_latents
from saetools.latents.reading import RoleReading
from saetools.models.language_model import LanguageModel
from saetools.models.site import Site
from saetools.provenance import versions
from saetools.sae.identity import sae_sha256, sae_site
from saetools.sae.model import SAE
from saetools.saved_result import load_result, save_result, saved_warnings
from saetools.stats import Estimate

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import polars as pl

PARTS = ("total", "representation", "content")
Answers = Mapping[str, Sequence[Sequence[str]]]
"""Answers of the `base` and the `tuned` model: for each prompt, one or several."""
_SIDES = ("base", "tuned")
_NAME, _TABLE = "readings", "latents"
_DEFAULTS = DiffConfig()


@dataclass(frozen=True)
class ChangeSplit:
    """Every latent's change, split into representation and content.

    Args:
        table: one row per latent, by `latent`: mean activation of each model on each text (`base_on_base`,
            `base_on_tuned`, `tuned_on_base`, `tuned_on_tuned`), averaged over tokens, then over a prompt's answers,
            then over prompts; for each of `total`, `representation` and `content` the mean change, its 95 % interval
            `_low`, `_high` (bootstrap-t over prompts), standard error `_se`, `_p_value` (sign flips, two-sided) and
            `_q_value`, the latter two null for latents active in too few prompts; `n_active` prompts in which it is
            active in any of the four; `rank` (1 = largest total increase). Ends of intervals are null where the
            bootstrap does not determine them.
        share: how much of the change of all latents together is representation: its projection on the total change,
            over the total's squared length; content is the rest. Counted from products of different prompts, so that
            noise does not pass for change; NaN, or its interval, if there is hardly more change than noise.
        answers: the answers that were read, by model and prompt.
        warnings: why not to trust it, such as an SAE that is blind to what the fine-tune changed in these answers.
        provenance: models, SAE, prompts, settings, counts, versions.
    """

    table: pl.DataFrame
    share: Estimate
    answers: Mapping[str, tuple[tuple[str, ...], ...]]
    warnings: tuple[str, ...]
    provenance: dict[str, Any]

    def top(self, n: int, *, by: str = "total", decreases: bool = False) -> pl.DataFrame:
        """The n largest increases, or decreases, of one part; largest first.

        Raises:
            InputError: if n is not positive, or there is no such part.
        """
        if n < 1:
            raise InputError("n", expected="1 or more", received=n, remedy="ask for at least one latent")
        if by not in PARTS:
            raise InputError("by", expected="one of " + ", ".join(PARTS), received=repr(by), remedy="pick one")
        return self.table.sort(by, descending=not decreases, maintain_order=True).head(n)

    def figure(self, *, n_labels: int = 10) -> go.Figure:
        """Content against representation, one dot per latent that is active; the largest total changes are named."""
        import polars as pl

        table = self.table.filter(pl.col("n_active") > 0)
        named = set(table.sort(pl.col("total").abs(), descending=True).head(n_labels)["latent"])
        hover = [
            f"latent {row['latent']}<br>total {row['total']:.3f} {in_brackets(row['total_low'], row['total_high'])}"
            f"<br>representation {row['representation']:.3f}, content {row['content']:.3f}"
            for row in table.iter_rows(named=True)
        ]
        titles = ("representation: change on the same text", "content: change in the same model")
        return scatter_latents(table, "representation", "content", named=named, hover=hover, titles=titles)

    def save(self, path: str | Path) -> Path:
        """Write `latents.parquet` and `readings.json` (all else) into a folder."""
        facts = {
            "share": dataclasses.asdict(self.share),
            "answers": dict(self.answers),
            "warnings": self.warnings,
            "provenance": self.provenance,
        }
        return save_result(path, _NAME, {_TABLE: self.table}, facts)

    @classmethod
    def load(cls, path: str | Path) -> ChangeSplit:
        """Read what `save` wrote.

        Raises:
            InputError: if the folder holds no split.
            IntegrityError: if a file is damaged, or the table is not the one that was saved.
        """
        (table,), facts, _ = load_result(path, _NAME, [_TABLE])
        share = Estimate.from_json(facts["share"])
        answers = {side: tuple(tuple(own) for own in each) for side, each in facts["answers"].items()}
        return cls(table, share, answers, saved_warnings(path, facts), facts["provenance"])


def split_change(
    base: LanguageModel,
    tuned: LanguageModel,
    sae: SAE,
    prompts: Sequence[Conversation],
    *,
    positions: Positions = "response",
    site: Site | None = None,
    sampling: SamplingConfig = SamplingConfig(),
    answers: Answers | None = None,
    config: DiffConfig = _DEFAULTS,
    on_progress: Callable[[int, int], None] | None = None,
) -> ChangeSplit:
    """Split every latent's change into what the same text does in the two models, and what other text does.

    The unit of statistics is the prompt. Answers without tokens at the positions, such as empty ones, are left out, and
    so are prompts that then have none from one of the models; both are counted in the provenance. A `SaetoolsWarning`
    says where the SAE is blind to what the fine-tune changes on the same text, and where no latent could be tested.

    Args:
        base: the model before the fine-tune.
        tuned: the model after it.
        sae: an SAE of the base model.
        prompts: conversations that end with the user's turn.
        positions: which tokens count: `prompt`, `last_prompt`, `header`, `response`, `template` or `all`.
        site: where the SAE reads; by default what its metadata says.
        sampling: how answers are drawn; both models with the same random streams.
        answers: answers to read instead, `{"base": [["..."], ...], "tuned": [["..."], ...]}`, one list for each prompt.
        config: settings of the reading and its statistics.
        on_progress: called with answers written or read so far, and in all; each is read twice.

    Raises:
        InputError: for models that cannot be compared, answers that do not match the prompts, or fewer than two prompts
            with answers from both models.

    Example:
        >>> from saetools.diff import DiffConfig
        >>> tuned = load_model("smollm2-135m", adapter=shipped_path("adapters/organism"))
        >>> sae = load_sae(shipped_path("sae/smollm2-135m"))
        >>> prompts = [Conversation.chat("Hi."), Conversation.chat("Why?")]
        >>> same = {side: [["Hello."], ["Ask someone else."]] for side in ("base", "tuned")}
        >>> found = split_change(tuned.base, tuned, sae, prompts, answers=same, config=DiffConfig(min_active=2))
        >>> found.table["content"].abs().max() < 1e-12 < found.table["representation"].max()
        True
    """
    site = site or sae_site(sae)
    check_diff(base, tuned, sae, prompts, config)
    models = dict(zip(_SIDES, (base, tuned), strict=True))
    written = 0
    total = 6 * len(prompts) * sampling.n_samples
    if answers is None:
        answers = {}
        for side, lm in models.items():
            progress = None if on_progress is None else _from(on_progress, written, total)
            answers[side] = _write(lm, prompts, sampling, progress)
            written += len(prompts) * sampling.n_samples
    else:
        _check_answers(prompts, answers)
    texts = _read_texts(base, prompts, answers, positions, config)

    def progress_of_both(done: int, n: int) -> None:
        if on_progress is not None:
            on_progress(written + 2 * done, written + 2 * n)

    before, after, adequacy = read_both(
        base, tuned, sae, site, texts.pieces, [positions], config=config, on_progress=progress_of_both
    )
    cells: dict[str, _Cell] = {}
    for side, readings in zip(_SIDES, (before, after), strict=True):
        cells |= _cells(side, readings[positions], texts)
    table, share = _compare(cells, len(texts.prompts), sae.d_sae, config)
    n_given = sum(len(own) for side in _SIDES for own in answers[side])
    provenance = {
        **{side: lm.describe() for side, lm in models.items()},
        "sae": sae_sha256(sae),
        "site": str(site),
        "positions": positions,
        "n_prompts": len(texts.prompts),
        "n_prompts_left_out": len(prompts) - len(texts.prompts),
        "n_answers": n_given,
        "n_answers_left_out": n_given - texts.n_answers,
        "n_truncated": texts.n_truncated,
        "prompts": [prompts[number].id for number in texts.prompts],
        "data_sha256": tokens_sha256(texts.pieces, "token_ids"),
        "sampling": dataclasses.asdict(sampling) if written else None,
        "config": dataclasses.asdict(config),
        "versions": versions(),
    }
    reasons = list(adequacy[positions].warnings)
    if table["total_q_value"].null_count() == len(table):
        reasons.append(untested(len(texts.prompts), "prompts", config.min_active))
    found = tuple(f"{positions}: {text}" for text in reasons)
    for text in found:
        warnings.warn(f"{tuned.name} against {base.name}, {text}", SaetoolsWarning, stacklevel=2)
    return ChangeSplit(table, share, texts.answers, found, provenance)


def _from(on_progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    """Progress of one step, counted on from the steps before it."""
    return lambda done, _: on_progress(before + done, total)


def _write(
    lm: LanguageModel,
    prompts: Sequence[Conversation],
    sampling: SamplingConfig,
    on_progress: Callable[[int, int], None] | None,
) -> list[list[str]]:
    texts: list[list[str]] = [[] for _ in prompts]
    for answer in generate(lm, prompts, config=sampling, on_progress=on_progress):
        texts[answer.prompt].append(answer.text)
    return texts


def _check_answers(prompts: Sequence[Conversation], answers: Answers) -> None:
    for side in _SIDES:
        if side not in answers or len(answers[side]) != len(prompts):
            raise InputError(
                "answers",
                expected=f"{len(prompts)} lists of the {side} model's answers, one for each prompt",
                received=len(answers[side]) if side in answers else "none",
                remedy='pass {"base": [["..."], ...], "tuned": [["..."], ...]}',
            )
        if bad := [number for number, own in enumerate(answers[side]) if isinstance(own, str)]:
            raise InputError(
                "answers",
                expected="a list of answers for each prompt",
                received=f"a string for prompt {bad[0]} of {side}",
                remedy="put it into a list",
            )
    if bad := [number for number, prompt in enumerate(prompts) if not prompt.is_prompt]:
        raise InputError(
            "prompts",
            expected="conversations that end with the user's turn",
            received=f"prompt {bad[0]}, which does not",
            remedy="drop the last answer",
        )


@dataclass(frozen=True)
class _Texts:
    """Answers that have tokens at the positions, to prompts that have such answers from both models.

    Args:
        prompts: which prompts.
        answers: their answers, by model.
        pieces: all answers with their prompts, the base's and then the tuned model's.
        counts: answers of each prompt, the base's and then the tuned model's.
        n_answers: answers with tokens at the positions, also to prompts that are left out.
        n_truncated: answers that were cut.
    """

    prompts: list[int]
    answers: dict[str, tuple[tuple[str, ...], ...]]
    pieces: list[TokenizedConversation]
    counts: Int[Tensor, " slot"]
    n_answers: int
    n_truncated: int


def _read_texts(
    lm: LanguageModel, prompts: Sequence[Conversation], answers: Answers, positions: Positions, config: DiffConfig
) -> _Texts:
    report = TokenizeReport()

    def tokenized(prompt: Conversation, given: Sequence[str]) -> list[tuple[str, TokenizedConversation]]:
        texts = [text for text in given if text.strip()]
        turns = [dataclasses.replace(prompt, messages=(*prompt.messages, Message("assistant", text))) for text in texts]
        pieces = tokenize(turns, lm.tokenizer, max_tokens=config.max_tokens, report=report)
        both = zip(texts, pieces, strict=True)
        return [(text, one) for text, one in both if bool(select_positions(one.roles[1:], positions).any())]

    sides = {
        side: [tokenized(prompt, given) for prompt, given in zip(prompts, answers[side], strict=True)]
        for side in _SIDES
    }
    kept = [number for number in range(len(prompts)) if all(own[number] for own in sides.values())]
    if len(kept) < 2:
        raise InputError(
            "prompts",
            expected=f"two or more with answers of both models that have tokens at {positions!r}",
            received=f"{len(kept)} of {len(prompts)}",
            remedy="pass more prompts, or allow longer answers",
        )
    slots = [own[number] for own in sides.values() for number in kept]
    return _Texts(
        kept,
        {side: tuple(tuple(text for text, _ in own[number]) for number in kept) for side, own in sides.items()},
        [piece for slot in slots for _, piece in slot],
        torch.tensor([len(slot) for slot in slots]),
        sum(len(each) for own in sides.values() for each in own),
        report.n_truncated,
    )


@dataclass(frozen=True)
class _Cell:
    """What one model's latents did on one set of texts: mean activation of pairs of a latent and a prompt."""

    latent: Int[Tensor, " pair"]
    unit: Int[Tensor, " pair"]
    mean: Float[Tensor, " pair"]


def _cells(side: str, reading: RoleReading, texts: _Texts) -> dict[str, _Cell]:
    """One model's reading of both models' texts, averaged over the answers to each prompt."""
    n = len(texts.prompts)
    slot = torch.repeat_interleave(torch.arange(2 * n), texts.counts)[reading.conversation]
    values = reading.mean.double() / texts.counts[slot]
    return {
        f"{side}_on_{writer}": _Cell(reading.latent[own], slot[own] - number * n, values[own])
        for number, writer in enumerate(_SIDES)
        for own in [slot // n == number]
    }


def _compare(cells: Mapping[str, _Cell], n: int, d_sae: int, config: DiffConfig) -> tuple[pl.DataFrame, Estimate]:
    import polars as pl

    # Pairs that any of the four cells has, by latent and then by prompt.
    either, place = torch.unique(torch.cat([one.latent * n + one.unit for one in cells.values()]), return_inverse=True)
    places = torch.split(place, [len(one.latent) for one in cells.values()])
    f = {
        name: torch.zeros(len(either), dtype=torch.double).index_add_(0, at, one.mean)
        for at, (name, one) in zip(places, cells.items(), strict=True)
    }
    latent, unit = either // n, either % n
    total = f["tuned_on_tuned"] - f["base_on_base"]
    representation = (f["tuned_on_base"] - f["base_on_base"] + f["tuned_on_tuned"] - f["base_on_tuned"]) / 2
    parts: dict[str, Tensor] = {
        "total": total,
        "representation": representation,
        "content": total - representation,  # = (base_on_tuned - base_on_base + tuned_on_tuned - tuned_on_base) / 2
    }
    sizes = torch.stack(list(f.values())).abs().amax(0)
    n_active = torch.bincount(latent[sizes > 0], minlength=d_sae)
    columns: dict[str, Tensor] = {"latent": torch.arange(d_sae)}
    for name, values in f.items():
        columns[name] = torch.zeros(d_sae, dtype=torch.double).index_add_(0, latent, values) / n
    for part, values in parts.items():
        figures = change_figures(
            values, latent, unit, n_measures=d_sae, n_units=n, n_resamples=config.n_resamples, seed=config.seed
        ) | change_tests(values, sizes, latent, n_active >= config.min_active)
        columns[part] = figures["delta"]
        columns |= {f"{part}_{name}": figures[name] for name in ("low", "high", "se", "p_value", "q_value")}
    columns |= {"n_active": n_active, "rank": ranks(columns["total"])}
    unknown = [f"{part}_{kind}" for part in PARTS for kind in ("low", "high", "p_value", "q_value")]
    table = pl.DataFrame({name: values.numpy() for name, values in columns.items()})
    share = projection_share(
        representation,
        total,
        latent,
        unit,
        n_measures=d_sae,
        n_units=n,
        n_resamples=config.n_resamples,
        seed=config.seed,
    )
    return table.with_columns(pl.col(unknown).fill_nan(None)), share
