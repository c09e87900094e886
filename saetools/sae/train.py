"""Training SAEs: one loop, over one stream of activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.errors import InputError
from saetools.models.site import Site
from saetools.room import enough_room
from saetools.sae.config import Progress, TrainConfig
from saetools.sae.model import SAE, SAEMetadata
from saetools.sae.trainer import Batch, Trainer
from saetools.team import Team

_SAMPLE = 65536  # tokens on which norms and mean are measured


@runtime_checkable
class ActivationSource(Protocol):
    """What one SAE trains on: epochs of shuffled batches that can be entered anywhere."""

    def n_batches(self, batch_size: int) -> int:
        """Batches of one epoch."""
        ...

    def epoch_batches(
        self, batch_size: int, *, seed: int, epoch: int = 0, start: int = 0
    ) -> Iterator[Float[Tensor, "batch *model d_model"]]:
        """The batches of an epoch from number `start` on; equal arguments give equal batches."""
        ...

    def sample(self, n_tokens: int, *, seed: int) -> Float[Tensor, "token *model d_model"]:
        """Random tokens, to measure norms and mean."""
        ...


@runtime_checkable
class SitesSource(Protocol):
    """The same for several sites at once."""

    def n_batches(self, batch_size: int) -> int:
        """Batches of one epoch."""
        ...

    def epoch_batches(
        self, batch_size: int, *, seed: int, epoch: int = 0, start: int = 0
    ) -> Iterator[Mapping[Site, Float[Tensor, "batch *model d_model"]]]:
        """The batches of an epoch from number `start` on; equal arguments give equal batches."""
        ...

    def sample(self, n_tokens: int, *, seed: int) -> Mapping[Site, Float[Tensor, "token *model d_model"]]:
        """Random tokens, to measure norms and mean."""
        ...


@dataclass(frozen=True)
class TrainRun:
    """One of several SAEs that train on the same activations.

    Args:
        config: its settings; `batch_size`, `n_tokens` and `data_seed` have to be those of the others.
        out: its folder.
        site: what it reads.
        metadata: what the activations are; its site is `site`, if it names none.
    """

    config: TrainConfig
    out: str | Path
    site: Site
    metadata: SAEMetadata = SAEMetadata()


def train_sae(
    source: ActivationSource,
    config: TrainConfig,
    out: str | Path,
    *,
    metadata: SAEMetadata = SAEMetadata(),
    on_progress: Callable[[Progress], None] | None = None,
    device: torch.device | str = "cpu",
) -> SAE:
    """Train an SAE; a run that was killed goes on from its last checkpoint, to the same bytes.

    Inputs are scaled to a mean norm of sqrt(d_model) and centred by b_dec while training; both are folded into the
    weights that are returned and saved, which take the residual stream as it is. (Bytes are equal for equal versions,
    number of threads and kind of processor, on CPUs.)

    In a process group (`torchrun`), all processes call it with equal arguments and train one SAE together: they divide
    the tokens of each batch or, with `config.shard_latents`, the latents. All need the same `out`.

    Args:
        source: activations, such as `store.at(site)`, or `StreamedActivations(...).at(site)` straight from a model.
        config: settings.
        out: folder for the SAE (SAELens' format), `train.jsonl` (the log) and `checkpoint.safetensors`.
        metadata: what the activations are; `median_norm` and the settings are added.
        on_progress: called with every line of the log.
        device: where to train.

    Raises:
        InputError: if settings cannot work, or the folder holds a run with other settings or on other activations.
        IntegrityError: if its checkpoint, or a shard, is damaged or has vanished.
        NonFiniteError: if an activation or the loss is not finite; the last checkpoint stays.
        ResourceError: if memory or disk space runs out; the last checkpoint stays.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> texts = [Conversation(text=pair.neutral) for pair in load_voices()[:4]]
        >>> store = harvest(lm, [Site(1)], list(tokenize(texts, lm.tokenizer)), folder + "/store")
        >>> config = TrainConfig(d_sae=64, batch_size=64, n_tokens=640)
        >>> train_sae(store.at(Site(1)), config, folder + "/sae").d_sae
        64
    """
    (sae,) = _train(
        _OneSite(source),
        [TrainRun(config, out, _ONE, metadata)],
        on_progress=None if on_progress is None else lambda _, progress: on_progress(progress),
        device=device,
    )
    return sae


def train_saes(
    source: SitesSource,
    runs: Sequence[TrainRun],
    *,
    on_progress: Callable[[int, Progress], None] | None = None,
    device: torch.device | str = "cpu",
) -> list[SAE]:
    """Train several SAEs in one pass: other widths, kinds, seeds or sites, on one stream of activations.

    Each ends in the same bytes as if it had been trained alone, and each goes on from its own last checkpoint.

    Args:
        source: activations of all sites, such as `StoredActivations(store)` or `StreamedActivations(...)`.
        runs: what to train.
        on_progress: called with the index of a run and a line of its log.
        device: where to train.

    Raises:
        InputError: if the runs need different batches, or for what `train_sae` refuses.
        IntegrityError: as `train_sae`.
        NonFiniteError: as `train_sae`.
        ResourceError: as `train_sae`.
    """
    named = [replace(run, metadata=replace(run.metadata, site=run.metadata.site or str(run.site))) for run in runs]
    return _train(source, named, on_progress=on_progress, device=device)


def _train(
    source: SitesSource,
    runs: Sequence[TrainRun],
    *,
    on_progress: Callable[[int, Progress], None] | None,
    device: torch.device | str,
) -> list[SAE]:
    _check(runs, device)
    config = runs[0].config
    steps_per_epoch = source.n_batches(config.batch_size)
    if steps_per_epoch < 1 or config.n_steps < 1:
        raise InputError(
            "config.batch_size",
            expected="at most the tokens there are and the tokens to train on",
            received=config.batch_size,
            remedy="lower batch_size, or harvest more",
        )
    samples: dict[str, Mapping[Site, Tensor]] = {}

    def sample(site: Site) -> Tensor:
        if not samples:
            samples["first"] = source.sample(_SAMPLE, seed=config.data_seed)
        return samples["first"][site]

    with enough_room("training; the last checkpoint stands"):
        trainers = [
            Trainer(
                run.config,
                Path(run.out),
                run.metadata,
                steps_per_epoch=steps_per_epoch,
                sample=partial(sample, run.site),
                device=device,
                team=Team.present(shard_latents=run.config.shard_latents),
                on_progress=None if on_progress is None else partial(on_progress, index),
            )
            for index, run in enumerate(runs)
        ]
        samples.clear()
        step = min(trainer.step for trainer in trainers)
        while step < config.n_steps:
            epoch, start = divmod(step, steps_per_epoch)
            for batch in source.epoch_batches(config.batch_size, seed=config.data_seed, epoch=epoch, start=start):
                for run, trainer in zip(runs, trainers, strict=True):
                    if trainer.step == step:  # one that a kill left ahead of the others waits for them
                        trainer.learn(batch[run.site])
                step += 1
                if step == config.n_steps:
                    break
        return [trainer.finish() for trainer in trainers]


def _check(runs: Sequence[TrainRun], device: torch.device | str) -> None:
    if not runs:
        raise InputError("runs", expected="at least one", received="none", remedy="pass a TrainRun")
    for run in runs:
        team = Team.present(shard_latents=run.config.shard_latents)
        run.config.check(device=device, n_processes=team.size)
        for name in ("batch_size", "n_tokens", "data_seed"):
            if getattr(run.config, name) != getattr(runs[0].config, name):
                raise InputError(
                    "runs",
                    expected=f"equal {name}, since all see the same batches",
                    received=", ".join(str(getattr(each.config, name)) for each in runs),
                    remedy="train them in different passes, or make it equal",
                )
    folders = [Path(run.out).resolve() for run in runs]
    if len(set(folders)) < len(folders):
        raise InputError("runs", expected="a folder for each", received="one twice", remedy="change out")


_ONE = Site(0)


@dataclass(frozen=True)
class _OneSite:
    """A source of one site among those of several; what the site is does not matter."""

    source: ActivationSource

    def n_batches(self, batch_size: int) -> int:
        return self.source.n_batches(batch_size)

    def epoch_batches(
        self, batch_size: int, *, seed: int, epoch: int = 0, start: int = 0
    ) -> Iterator[Mapping[Site, Batch]]:
        batches = self.source.epoch_batches(batch_size, seed=seed, epoch=epoch, start=start)
        return ({_ONE: batch} for batch in batches)

    def sample(self, n_tokens: int, *, seed: int) -> Mapping[Site, Batch]:
        return {_ONE: self.source.sample(n_tokens, seed=seed)}
