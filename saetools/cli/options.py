"""Groups of options that several commands share, and how they become models, data and edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from saetools.errors import InputError, SaetoolsWarning

if TYPE_CHECKING:
    from saetools.data import Conversation
    from saetools.models import Edits, LanguageModel
    from saetools.sae import SAE


@dataclass(frozen=True)
class ModelOptions:
    """Which model."""

    model: str = "smollm2-135m"
    """Built-in name, directory, GGUF file or hub id."""
    adapter: str | None = None
    """PEFT adapter on top: a directory or hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; auto keeps the checkpoint's."""
    chat_template: str | None = None
    """A file with a Jinja chat template, for models without one."""

    def load(self) -> LanguageModel:
        """The model."""
        import torch

        from saetools.models import load_model

        dtype: torch.dtype | Literal["auto"] = "auto" if self.dtype == "auto" else getattr(torch, self.dtype)
        return load_model(self.model, adapter=self.adapter, dtype=dtype, chat_template=self.chat_template)


@dataclass(frozen=True)
class DataOptions:
    """What to read."""

    data: tuple[str, ...]
    """Files: JSONL with `messages`, `prompt` or `text`; Parquet with such columns; plain text."""
    skip_bad: bool = False
    """Count bad rows instead of stopping at the first."""
    limit: int | None = None
    """Read so many rows of each file."""

    def conversations(self) -> list[Conversation]:
        """All rows of all files; says how many were skipped."""
        from itertools import islice

        from saetools.data import ReadReport, read_conversations

        report = ReadReport()
        rows: list[Conversation] = []
        for file in self.data:
            rows += islice(read_conversations(file, skip_bad=self.skip_bad, report=report), self.limit)
        if report.n_skipped:
            warn(f"{report.n_skipped} of {report.n_rows} rows skipped; first: {report.first_errors[0]}")
        if not rows:
            raise InputError("data", expected="at least one row", received="none", remedy="check the files")
        return rows


@dataclass(frozen=True)
class EditOptions:
    """What to do to the residual stream; values are given as LATENT=VALUE, several may follow."""

    sae: str | None = None
    """Folder of the SAE whose latents are edited; by default the shipped one."""
    clamp: tuple[str, ...] = ()
    """LATENT=ACTIVATION: set a latent on every token."""
    clamp_p99: tuple[str, ...] = ()
    """LATENT=MULTIPLE: the same in multiples of its 99th percentile."""
    add: tuple[str, ...] = ()
    """LATENT=STRENGTH: add its direction, in units of the median residual norm."""
    scale: tuple[str, ...] = ()
    """LATENT=FACTOR: multiply its activation."""
    ablate: tuple[int, ...] = ()
    """Latents to set to 0."""
    tokens: Literal["all", "prompt", "response"] = "all"
    """Tokens that are edited."""

    def edits(self) -> Edits:
        """The edits, in the order clamp, clamp-p99, add, scale, ablate; empty if none are asked for."""
        from saetools import steer
        from saetools.diff import sae_site

        if not (self.clamp or self.clamp_p99 or self.add or self.scale or self.ablate):
            return {}
        sae = load_sae_option(self.sae)
        made = []
        for latents, values in filter(None, [_pairs("clamp", self.clamp)]):
            made.append(steer.clamp(sae, latents, values, tokens=self.tokens))
        for latents, values in filter(None, [_pairs("clamp-p99", self.clamp_p99)]):
            made.append(steer.clamp(sae, latents, values, unit="p99", tokens=self.tokens))
        for option, texts, make in (("add", self.add, steer.add), ("scale", self.scale, steer.scale)):
            for latents, values in filter(None, [_pairs(option, texts)]):
                made += [
                    make(sae, latent, value, tokens=self.tokens) for latent, value in zip(latents, values, strict=True)
                ]
        if self.ablate:
            made.append(steer.ablate(sae, self.ablate, tokens=self.tokens))
        return {sae_site(sae): made}


def load_sae_option(path: str | None) -> SAE:
    """An SAE by its folder, by default the shipped one."""
    from saetools.data import shipped_path
    from saetools.demo import SAE_NAME
    from saetools.sae import load_sae

    return load_sae(shipped_path(SAE_NAME) if path is None else Path(path))


def _pairs(option: str, texts: tuple[str, ...]) -> tuple[list[int], list[float]] | None:
    if not texts:
        return None
    latents, values = [], []
    for text in texts:
        latent, _, value = text.partition("=")
        try:
            latents.append(int(latent))
            values.append(float(value))
        except ValueError as error:
            raise InputError(
                f"--{option}", expected="LATENT=VALUE, such as 123=0.5", received=repr(text), remedy="mend it"
            ) from error
    return latents, values


def warn(message: str) -> None:
    """Print a warning line."""
    import warnings

    warnings.warn(message, SaetoolsWarning, stacklevel=2)


@contextmanager
def progress(label: str, unit: str) -> Iterator[Callable[..., None]]:
    """A rich progress bar, driven by a callback of done, total and a note; silent where there is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]} {task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(label, total=None, unit=unit, note="")

        def update(done: int, total: int, note: str = "") -> None:
            bars.update(task, completed=done, total=total, note=note)

        yield update
