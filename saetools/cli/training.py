"""The commands that make SAEs: `harvest` and `train`, by one process or by several of `torchrun`."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saetools.cli.options import DataOptions, ModelOptions, at_least, progress
from saetools.cli.output import check_folder
from saetools.errors import InputError
from saetools.sae import Progress, TrainConfig

if TYPE_CHECKING:
    import torch

    from saetools.activations import ActivationBlock, Activations
    from saetools.data import TokenizedConversation, TokenizeReport
    from saetools.models import LanguageModel, Site
    from saetools.sae import SAE, TrainRun
    from saetools.team import Team


@dataclass(frozen=True)
class Harvest:
    """Write residual activations of a model to a store on disk; a killed run continues. Runs under torchrun, too."""

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
        from saetools.models import Site

        check_folder(Path(self.out))
        sites = [Site.parse(name) for name in self.sites]
        with _team() as team:
            lm, tokenized, report = _tokenized(self.model, self.read, self.max_tokens)
            config = HarvestConfig(dtype=self.storage_dtype)
            with _progress(team, "harvest", "tokens") as update:
                store = harvest(lm, sites, tokenized, self.out, config=config, on_progress=update)
            if team.rank == 0:
                print(f"{len(store)} tokens of {report.n_conversations} conversations in {self.out}; {cuts(report)}")


@dataclass(frozen=True)
class StreamOptions(DataOptions):
    """What to read, where no store is given."""

    data: tuple[str, ...] = ()
    """Files to read straight from a model, as for `harvest`, where there is no store."""


@dataclass(frozen=True)
class Train:
    """Train an SAE on a store, or straight from a model; a killed run continues. Runs under torchrun, too.

    The kind of SAE is a subcommand, by default TopK.
    """

    out: str
    """Folder of the SAE, in SAELens' format; with several sites, of one folder for each."""
    store: str | None = None
    """Folder of a store."""
    read: StreamOptions = field(default_factory=StreamOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    sites: tuple[str, ...] = ()
    """What the SAE reads; with several, one SAE for each, trained in one pass. May be left out if a store has one."""
    max_tokens: int = 256
    """Without a store: longer texts are split, longer chats cut."""
    buffer_tokens: int = 131_072
    """Without a store: tokens in memory, which are shuffled together."""
    statistics_tokens: int = 200_000
    """About how many tokens the latents' 99th percentiles are measured on afterwards."""
    storage_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the saved weights."""
    device: str | None = None
    """Where to train, such as cuda:1; by default the first GPU, if there is one."""
    config: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        at_least(1, "--statistics-tokens", self.statistics_tokens)
        at_least(1, "--buffer-tokens", self.buffer_tokens)
        at_least(2, "--max-tokens", self.max_tokens)
        if (self.store is None) == (not self.read.data):
            raise InputError("--store", expected="either --store or --data", received="both or none", remedy="give one")

    def run(self) -> None:
        """Train, measure the latents, save."""
        from saetools.sae import train_saes

        check_folder(Path(self.out))
        with _team() as team:
            device = _device(self.device, team)
            source, runs, blocks = self._from_store() if self.store is not None else self._from_model(device)
            with _progress(team, "train", "steps") as update:

                def show(_: int, now: Progress) -> None:
                    note = f"FVU {now.fvu:.3f}  L0 {now.l0:.1f}  dead {now.dead:.1%}  {now.tokens_per_second:,.0f}"
                    update(now.step, now.n_steps, note + " tokens/s")

                saes = train_saes(source, runs, on_progress=show, device=device)
            if team.rank == 0:
                for sae, run in zip(saes, runs, strict=True):
                    self._save(sae.to(device), run, blocks())

    def _from_store(self) -> tuple[Activations[Any], list[TrainRun], Callable[[], Iterator[ActivationBlock]]]:
        import itertools

        from saetools.activations import ActivationStore, StoredActivations

        assert self.store is not None
        store = ActivationStore(self.store)
        origin = {key: store.manifest[key] for key in ("model", "data_sha256", "config")}
        runs = self._runs(store.sites, store.manifest["model"]["name"], origin | {"n_tokens_stored": len(store)})
        n_blocks = max(1, self.statistics_tokens * len(store.manifest["shards"]) // len(store))
        source = StoredActivations(store, [run.site for run in runs])
        return source, runs, lambda: itertools.islice(store.blocks(), n_blocks)

    def _from_model(
        self, device: torch.device
    ) -> tuple[Activations[Any], list[TrainRun], Callable[[], Iterator[ActivationBlock]]]:
        from saetools.activations import StreamedActivations, stream_activations
        from saetools.data.tokenizing import tokens_sha256

        if not self.sites:
            raise InputError(
                "--sites", expected="where to read", received="none", remedy="such as blocks.15.hook_resid_post"
            )
        lm, tokenized, _ = _tokenized(self.model, self.read, self.max_tokens)
        origin = {
            "model": lm.describe(),
            "data_sha256": tokens_sha256(tokenized, "token_ids"),
            "config": {"buffer_tokens": self.buffer_tokens, "max_tokens": self.max_tokens},
            "n_tokens_stored": 0,
        }
        runs = self._runs((), lm.name, origin)
        sites = [run.site for run in runs]
        source = StreamedActivations(lm, sites, tokenized, buffer_tokens=self.buffer_tokens)
        share = min(1.0, self.statistics_tokens / len(source))
        chosen = random.Random(0).sample(tokenized, max(1, round(share * len(tokenized))))
        return source, runs, lambda: stream_activations(lm, sites, chosen)

    def _runs(self, known: tuple[Site, ...], model_name: str, origin: dict[str, Any]) -> list[TrainRun]:
        from saetools.models import Site
        from saetools.sae import SAEMetadata, TrainRun

        if not self.sites and len(known) != 1:
            names = ", ".join(map(str, known))
            raise InputError("--sites", expected=f"some of {names}", received="none", remedy="say which")
        sites = [Site.parse(name) for name in self.sites] or list(known)
        return [
            TrainRun(
                self.config,
                Path(self.out) if len(sites) == 1 else Path(self.out) / str(site),
                site,
                SAEMetadata(model_name=model_name, provenance={"activations": origin}),
            )
            for site in sites
        ]

    def _save(self, sae: SAE, run: TrainRun, blocks: Iterator[ActivationBlock]) -> None:
        import torch

        from saetools.latents import measure_latents, with_statistics
        from saetools.sae import save_sae

        statistics = measure_latents(sae, blocks, run.site)
        median_norm = sae.metadata.median_norm or statistics.median_norm
        sae = with_statistics(sae, dataclasses.replace(statistics, median_norm=median_norm))
        save_sae(sae, run.out, storage_dtype=getattr(torch, self.storage_dtype))
        print(f"SAE with {sae.d_sae} latents in {run.out}")


def cuts(report: TokenizeReport) -> str:
    """What a length limit took away."""
    return f"--max-tokens cut {report.n_tokens_cut} tokens off {report.n_truncated} of them"


def _tokenized(
    model: ModelOptions, read: DataOptions, max_tokens: int
) -> tuple[LanguageModel, list[TokenizedConversation], TokenizeReport]:
    import torch

    from saetools.data import TokenizeReport, tokenize

    if "LOCAL_RANK" in os.environ and model.device_map == "auto" and torch.cuda.is_available():
        model = dataclasses.replace(model, device_map=f"cuda:{os.environ['LOCAL_RANK']}")  # a GPU for each process
    rows, lm, report = read.conversations(), model.load(), TokenizeReport()
    return lm, list(tokenize(rows, lm.tokenizer, max_tokens=max_tokens, split_texts=True, report=report)), report


@contextmanager
def _team() -> Iterator[Team]:
    """The processes that `torchrun` has started, or this one alone."""
    from torch import distributed

    from saetools.team import Team

    starts = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized()
    if starts:
        distributed.init_process_group()
    try:
        yield Team.present()
    finally:
        if starts:
            distributed.destroy_process_group()


@contextmanager
def _progress(team: Team, label: str, unit: str) -> Iterator[Callable[..., None]]:
    """A bar in the first process."""
    with progress(label, unit) if team.rank == 0 else nullcontext(lambda *_: None) as update:
        yield update


def _device(name: str | None, team: Team) -> torch.device:
    """A device that is there; with several processes, each has its own GPU."""
    import torch

    if name is None:
        own = f"cuda:{os.environ['LOCAL_RANK']}" if team.size > 1 else "cuda"
        return torch.device(own if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            "--device", expected="a device of this machine", received=f"{name!r} ({reason})", remedy="try cpu or cuda"
        ) from error
