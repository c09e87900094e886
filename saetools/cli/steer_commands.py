"""Commands that answer prompts under edits: side by side, from a file, and over many strengths."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saetools.cli.options import (
    DataOptions,
    EditOptions,
    EditSources,
    EndpointOptions,
    ModelOptions,
    at_least,
    progress,
)
from saetools.cli.output import check_file, check_folder, print_json, printable
from saetools.errors import InputError
from saetools.evaluate.sweep import SweepConfig
from saetools.generation import SamplingConfig
from saetools.provenance import sha256_of_texts, versions, write_text

if TYPE_CHECKING:
    from saetools.data import Conversation
    from saetools.evaluate import Sweep as SweepResult
    from saetools.models import Edits, LanguageModel


@dataclass(frozen=True)
class Steer:
    """Answer prompts with and without an edit, side by side."""

    prompts: tuple[str, ...]
    """User messages."""
    edit: EditOptions = field(default_factory=EditOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    out: str | None = None
    """JSONL file for the answers."""

    def __post_init__(self) -> None:
        at_least(1, "the number of --prompts", len(self.prompts))
        if not self.edit.edit:
            raise InputError(
                "--edit", expected="at least one edit", received="none", remedy='give one, such as "clamp 1234=0"'
            )

    def run(self) -> None:
        """Generate and print."""
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        from saetools.generation import generate

        if self.out is not None:
            check_file(Path(self.out))
        lm = self.model.load()
        edits = self.edit.edits(lm)
        with progress("generate", "answers") as update:
            variants = {"plain": None, "edited": edits}
            answers = generate(lm, self.prompts, variants=variants, config=self.sampling, on_progress=update)
        table = Table("prompt", "variant", "answer", show_lines=True)
        for answer in answers:
            table.add_row(
                *(escape(printable(text)) for text in (self.prompts[answer.prompt], answer.variant, answer.text))
            )
        Console().print(table)
        print("edit: " + "; ".join(str(fn) for fns in edits.values() for fn in fns))  # type: ignore[union-attr]
        if self.out is not None:
            _write_jsonl(Path(self.out), [dataclasses.asdict(answer) for answer in answers])


@dataclass(frozen=True)
class Generate:
    """Answer the prompts of a file, under edits if any, and write JSONL; a killed run goes on."""

    read: DataOptions
    out: str
    """JSONL file for the answers; until all are there, they are in one whose name ends in .part."""
    edit: EditOptions = field(default_factory=EditOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def run(self) -> None:
        """Generate and write."""
        from saetools.evaluate.cells import Cells
        from saetools.generation import generate_batches

        out = Path(self.out)
        check_file(out)
        rows, lm = self.read.conversations(), self.model.load()
        edits = self.edit.edits(lm)
        name = "edited" if edits else "plain"
        part = out.with_name(out.name + ".part")
        cells = Cells(part, self._identity(lm, rows, edits))
        jobs = [(row, name, sample) for row in range(len(rows)) for sample in range(self.sampling.n_samples)]
        done = {job for job in jobs if _key(job) in cells}
        with progress("generate", "answers") as update:
            for some in generate_batches(lm, rows, {name: edits or None}, self.sampling, skip=done):
                cells.add({_key((one.prompt, name, one.sample)): dataclasses.asdict(one) for one in some})
                done |= {(one.prompt, name, one.sample) for one in some}
                update(len(done), len(jobs))
        _write_jsonl(
            out,
            [{"id": rows[job[0]].id, "question": rows[job[0]].messages[-1].content} | cells[_key(job)] for job in jobs],
        )
        part.unlink()

    def _identity(self, lm: LanguageModel, rows: list[Conversation], edits: Edits) -> dict[str, Any]:
        """What answers belong to."""
        from saetools.steer.identity import edits_sha256

        asked = [json.dumps([(one.role, one.content) for one in row.messages]) for row in rows]
        sampling = {name: value for name, value in dataclasses.asdict(self.sampling).items() if name != "batch_rows"}
        return {
            "model": lm.describe(),
            "edits": edits_sha256(edits),
            "prompts_sha256": sha256_of_texts(asked),
            "sampling": sampling,
            "versions": versions(),
        }


@dataclass(frozen=True)
class Sweep:
    """Answer prompts under edits at many strengths, and tell up to which of them answers are coherent."""

    edit: tuple[str, ...]
    """Edits with {} in the place of the strength, such as "add 6400={}*norm"; each is swept by itself."""
    strengths: tuple[float, ...]
    """Strengths; all above 0, or all below."""
    out: str
    """Folder for the answers and a figure for every edit; a killed run goes on there."""
    sources: EditSources = field(default_factory=EditSources)
    model: ModelOptions = field(default_factory=ModelOptions)
    prompts: tuple[str, ...] = ()
    """User messages; by default 24 shipped questions."""
    data: tuple[str, ...] = ()
    """Files of prompts, instead of --prompts."""
    config: SweepConfig = field(default_factory=SweepConfig)
    judge: EndpointOptions = field(default_factory=EndpointOptions)
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        at_least(1, "the number of --edit", len(self.edit))
        at_least(1, "the number of --strengths", len(self.strengths))
        if without := [text for text in self.edit if "{}" not in text]:
            raise InputError(
                "--edit", expected="{} in the place of the strength", received=repr(without[0]), remedy="put it in"
            )
        if self.prompts and self.data:
            raise InputError("--data", expected="either --prompts or --data", received="both", remedy="give one")

    def run(self) -> None:
        """Sweep, save, print."""
        from saetools.data import Conversation, load_free_form, read_conversations
        from saetools.evaluate import coherence_judge, plot_dose_response, sweep_edits
        from saetools.evaluate.coherence import largest_coherent
        from saetools.steer import parse_edits

        check_folder(Path(self.out))
        largest_coherent(dict.fromkeys(self.strengths, 0.0), 1.0)  # all of one sign
        lm = self.model.load()
        sources = self.sources.load(lm)
        edits = {
            text: {
                strength: parse_edits([text.replace("{}", repr(strength))], **sources) for strength in self.strengths
            }
            for text in self.edit
        }
        questions = self.prompts or [item.question for item in load_free_form()[:24]]
        prompts = [Conversation.chat(question) for question in questions]
        if self.data:
            prompts = [row for file in self.data for row in read_conversations(file)]
        endpoint = self.judge.made()
        judge = None if endpoint is None else coherence_judge(endpoint)
        with progress("sweep", "answers") as update:
            sweep = sweep_edits(lm, edits, prompts, config=self.config, judge=judge, out=self.out, on_progress=update)
        sweep.save(self.out)
        for number, text in enumerate(edits, 1):
            write_text(Path(self.out) / f"edit-{number}.html", plot_dose_response(sweep, edit=text).to_html())
        if self.json:
            largest = {text: sweep.max_coherent_strength(text) for text in edits}
            print_json(
                {"doses": sweep.doses().to_dicts(), "max_coherent_strength": largest, "warnings": sweep.warnings}
            )
        else:
            _print_sweep(sweep, self.out)


def _print_sweep(sweep: SweepResult, out: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("edit", "strength", "answers", "incoherent", "nats a token", "repeated", "refused", "other language")
    for row in sweep.doses().iter_rows(named=True):
        shares = (f"{row[name]:.0%}" for name in ("repetition", "refused", "other_language"))
        surprise = "" if row["surprise"] is None else f"{row['surprise']:.2f}"
        table.add_row(row["edit"], f"{row['strength']:g}", str(row["n"]), f"{row['incoherent']:.0%}", surprise, *shares)
    Console().print(table)
    for text in sweep.edits:
        print(f"{text}: coherent up to {sweep.max_coherent_strength(text):g}")
    for warning in sweep.warnings:
        print(warning)
    print(f"answers and figures in {out}")


def _key(job: tuple[int, str, int]) -> str:
    return "/".join(map(str, job))


def _write_jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rows)} answers in {path}")
