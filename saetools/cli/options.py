"""Groups of options that several commands share, and how they become models, data and edits."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saetools.errors import InputError, SaetoolsWarning

if TYPE_CHECKING:
    from saetools.data import Conversation
    from saetools.models import Edits, LanguageModel, Site
    from saetools.sae import SAE


_SHIPPED_WIDTH = 576  # of the shipped SAE
_LINE_SECONDS = 30.0  # between lines of progress in a log file


@dataclass(frozen=True)
class ModelOptions:
    """Which model."""

    model: str = "smollm2-135m"
    """Built-in name, directory, GGUF file or hub id."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    adapter: tuple[str, ...] = ()
    """PEFT adapters, directories or hub ids: one as PATH, several as NAME=PATH. The model is seen through the first."""
    tokenizer: str | None = None
    """Directory or hub id of a tokenizer, in place of the model's own."""
    chat_template: str | None = None
    """A file with a Jinja chat template, for models without one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; auto keeps the checkpoint's."""
    device_map: str = "auto"
    """Where the weights go, such as cpu or cuda:1; auto spreads them over the GPUs that there are."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Load the weights in so many bits; needs bitsandbytes."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""

    def __post_init__(self) -> None:
        self.adapters()

    def adapters(self) -> str | dict[str, str] | None:
        """The adapters as `load_model` takes them, the first of which is seen."""
        named = [re.fullmatch(r"([\w-]+)=(.+)", text) for text in self.adapter]
        if len(named) == 1 and named[0] is None:
            return self.adapter[0]
        by_name = {match[1]: match[2] for match in named if match is not None}
        if len(by_name) < len(named):
            raise InputError(
                "--adapter",
                expected="one PATH, or several NAME=PATH with different names",
                received=" ".join(self.adapter),
                remedy="name each",
            )
        return by_name or None

    def load(self) -> LanguageModel:
        """The model."""
        import torch

        from saetools.models import load_model

        return load_model(
            self.model,
            adapter=self.adapters(),
            tokenizer=self.tokenizer,
            chat_template=None if self.chat_template is None else Path(self.chat_template),
            revision=self.revision,
            dtype="auto" if self.dtype == "auto" else getattr(torch, self.dtype),
            device_map=self.device_map,
            quantization=self.quantization,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True)
class PairOptions:
    """A base model, alone or with its fine-tune."""

    model: ModelOptions = field(default_factory=ModelOptions)
    tuned: str | None = None
    """The fine-tune, where it is a model and no adapter; loaded with the base's options, --revision aside."""

    def __post_init__(self) -> None:
        if self.tuned is not None and self.model.adapter:
            raise InputError("--adapter", expected="either --adapter or --tuned", received="both", remedy="give one")

    def models(self) -> dict[str, LanguageModel]:
        """The `base` and, where there is one, the `tuned` model; an adapter is a view of its base."""
        lm = self.model.load()
        if self.tuned is not None:
            return {"base": lm, "tuned": dataclasses.replace(self.model, model=self.tuned, revision=None).load()}
        return {"base": lm.base} | ({} if lm.adapter is None else {"tuned": lm})

    def voices(self) -> dict[str, LanguageModel]:
        """The same, with every adapter by its own name.

        Raises:
            InputError: for an adapter called `base`.
        """
        models = self.models()
        if "base" in (adapters := models["base"].adapters):
            raise InputError("--adapter", expected="other names than 'base'", received="base", remedy="rename it")
        named = {name: models["base"].with_adapter(name) for name in adapters}
        return {"base": models["base"], **(named or {name: lm for name, lm in models.items() if name != "base"})}


@dataclass(frozen=True)
class TunedOptions(PairOptions):
    """A base model and its fine-tune."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tuned is None and not self.model.adapter:
            raise InputError("--adapter", expected="either --adapter or --tuned", received="none", remedy="give one")

    def load(self) -> tuple[LanguageModel, LanguageModel]:
        """Both models."""
        models = self.models()
        return models["base"], models["tuned"]


@dataclass(frozen=True)
class DataOptions:
    """What to read."""

    data: tuple[str, ...]
    """Files: JSONL with `messages`, `prompt` or `text`; Parquet with such columns; plain text."""
    skip_bad: bool = False
    """Count bad rows instead of stopping at the first."""
    limit: int | None = None
    """Read so many rows of each file."""

    def __post_init__(self) -> None:
        if self.limit is not None:
            at_least(1, "--limit", self.limit)

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
            raise InputError("--data", expected="at least one row", received="none", remedy="check the files")
        return rows


@dataclass(frozen=True)
class SAEOptions:
    """Which SAE."""

    sae: str | None = None
    """Folder of the SAE, or a release that SAELens knows; by default the shipped one."""
    site: str | None = None
    """Where it reads, such as blocks.15.hook_resid_post; by default where its metadata says."""
    sae_id: str | None = None
    """Which SAE of a release or of a folder with several."""

    def __post_init__(self) -> None:
        from saetools.models import Site

        if self.site is not None:
            Site.parse(self.site)

    def load(self, lm: LanguageModel) -> tuple[SAE, Site]:
        """The SAE, on the model's device, and its site."""
        from saetools.data import shipped_path
        from saetools.demo import SAE_NAME
        from saetools.models import Site
        from saetools.sae import load_sae

        source = shipped_path(SAE_NAME) if self.sae is None else self.sae
        sae = load_sae(source, sae_id=self.sae_id, device=lm.device)
        if sae.d_in != lm.d_model:
            raise InputError(
                "--sae",
                expected=f"an SAE of width {lm.d_model}, the model's",
                received=f"{self.sae or 'the shipped one'} of width {sae.d_in}",
                remedy="give an SAE of this model",
            )
        name = self.site or sae.metadata.site
        if not name:
            raise InputError("--site", expected="a site", received="none, and the SAE names none", remedy="give it")
        return sae, Site.parse(name)


@dataclass(frozen=True)
class EndpointOptions:
    """A language model behind an OpenAI-compatible address; its key is read from OPENAI_API_KEY."""

    endpoint: str | None = None
    """Its address, such as http://localhost:8000/v1."""
    llm: str | None = None
    """The model, as the server calls it."""
    timeout: float = 60.0
    """Seconds until a request counts as lost."""
    max_concurrent: int = 4
    """Requests in flight at the same time."""

    def __post_init__(self) -> None:
        if (self.endpoint is None) != (self.llm is None):
            raise InputError(
                "--endpoint", expected="both --endpoint and --llm, or none", received="one", remedy="add the other"
            )

    def made(self) -> Any:
        """The endpoint, or `None`."""
        from saetools.endpoint import Endpoint

        if self.endpoint is None or self.llm is None:
            return None
        return Endpoint(self.endpoint, self.llm, timeout=self.timeout, max_concurrent=self.max_concurrent)


@dataclass(frozen=True)
class EditSources:
    """What edits may name."""

    sae: SAEOptions = field(default_factory=SAEOptions)
    direction: tuple[str, ...] = ()
    """Directions, as NAME=FOLDER of a saved direction; only those at the site of an edit count."""

    def __post_init__(self) -> None:
        for text in self.direction:
            if "=" not in text:
                raise InputError("--direction", expected="NAME=FOLDER", received=repr(text), remedy="name it")

    def folders(self) -> dict[str, str]:
        """Folders of directions, by name."""
        return {name: folder for name, _, folder in (text.partition("=") for text in self.direction)}

    def load(self, lm: LanguageModel) -> dict[str, Any]:
        """SAE, site and directions, as `parse_edits` takes them; no SAE if none is asked for and ours does not fit."""
        from saetools.directions import Direction
        from saetools.models import Site

        directions = {name: Direction.load(folder).vectors for name, folder in self.folders().items()}
        if self.sae.sae is not None or lm.d_model == _SHIPPED_WIDTH:
            sae, site = self.sae.load(lm)
            return {"sae": sae, "site": site, "directions": directions}
        named = None if self.sae.site is None else Site.parse(self.sae.site)
        return {"sae": None, "site": named, "directions": directions}


@dataclass(frozen=True)
class EditOptions:
    """What to do to the residual stream."""

    sources: EditSources = field(default_factory=EditSources)
    edit: tuple[str, ...] = ()
    """Edits as they print, such as "clamp 6400=0 on response" or "add 12=0.3*norm"; they run in this order, at the site
    of the SAE or at one that is put before them: "blocks.15.hook_resid_post: project_out evil"."""

    def edits(self, lm: LanguageModel) -> Edits:
        """The edits by site; empty if none are asked for."""
        from saetools.steer import parse_edits

        return parse_edits(self.edit, **self.sources.load(lm)) if self.edit else {}


def at_least(least: int, option: str, value: int) -> None:
    """Raise if an option's number is too small."""
    if value < least:
        raise InputError(option, expected=f"{least} or more", received=value, remedy="raise it")


def warn(message: str) -> None:
    """Print a warning line."""
    import warnings

    warnings.warn(message, SaetoolsWarning, stacklevel=2)


@contextmanager
def progress(label: str, unit: str) -> Iterator[Callable[..., None]]:
    """A rich progress bar, driven by a callback of done, total and a note; a line each half minute without terminal."""
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
    if not console.is_terminal:
        yield _lines(label, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]} {task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(label, total=None, unit=unit, note="")

        def update(done: int, total: int, note: str = "") -> None:
            bars.update(task, completed=done, total=total, note=note)

        yield update


def _lines(label: str, unit: str) -> Callable[..., None]:
    """Progress for a log file: how far it is, once in a while."""
    started = last = time.monotonic()

    def update(done: int, total: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_SECONDS:
            last = now
            said = f"{label}: {done} of {total} {unit} {note}".rstrip()
            print(f"{said}, after {now - started:.0f} s", file=sys.stderr, flush=True)

    return update
