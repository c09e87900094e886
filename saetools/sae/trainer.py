"""One SAE in training: where it starts, what a step does to it, and the SAE that comes out."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saetools.errors import NonFiniteError
from saetools.provenance import versions
from saetools.sae.checkpoint import State, load_checkpoint, save_checkpoint
from saetools.sae.config import Progress, TrainConfig
from saetools.sae.io import save_sae
from saetools.sae.model import SAE, SAEMetadata
from saetools.sae.objective import StepContext
from saetools.sae.weights import Weights, map_latents
from saetools.team import Team

Batch = Shaped[Tensor, "token ..."]
"""Activations [token, d_model], or of several models side by side, [token, model, d_model]."""


class Trainer:
    """An SAE that learns batch by batch; a folder that holds a run goes on from its last checkpoint.

    Args:
        config: checked settings.
        out: folder of the run.
        metadata: what the activations are.
        steps_per_epoch: batches before the data begins anew.
        sample: gives random activations, to measure norms and mean; asked only at the start of a run.
        device: where to train.
        team: the processes that train it.
        on_progress: called with every line of the log.

    Raises:
        InputError: if the folder holds another run.
        IntegrityError: if its checkpoint is damaged.
        NonFiniteError: if the sample is not finite.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        metadata: SAEMetadata,
        *,
        steps_per_epoch: int,
        sample: Callable[[], Batch],
        device: torch.device | str,
        team: Team,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.config, self.out, self.metadata, self.team, self.device = config, out, metadata, team, device
        self.on_progress = on_progress
        self.dtype, self.encode_dtype = getattr(torch, config.weight_dtype), getattr(torch, config.encode_dtype)
        self.identity = _identity(config, metadata, steps_per_epoch)
        out.mkdir(parents=True, exist_ok=True)
        self.state = load_checkpoint(out, self.identity, config.loss, device, team) or _initialise(
            sample().to(device, self.dtype), config, team
        )
        if team.rank == 0:
            _trim_log(out / "train.jsonl", self.step)
        self.window = _Window()

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.step

    def learn(self, batch: Batch) -> None:
        """One step; writes the log and the checkpoint when it is time.

        Raises:
            NonFiniteError: if an activation or the loss is not finite; the last checkpoint stays.
            ResourceError: if the checkpoint does not fit on the disk; the last one stays.
        """
        config, state, team = self.config, self.state, self.team
        x, n_left_out = self._prepared(batch)
        dead = state.last_fired >= config.dead_after_tokens
        context = StepContext(dead, self.encode_dtype, state.step, state.buffers, team)
        result = config.loss.step(x, state.weights, state.grads, context)
        if not bool(torch.isfinite(result.loss)):
            raise NonFiniteError(
                f"the loss is not finite at step {state.step}; the last checkpoint in {self.out} stands. Lower lr"
            )
        lr = config.lr_at(state.step)
        _update(state, lr, config, team)
        state.last_fired.add_(result.n_tokens).masked_fill_(result.fired, 0)
        state.step += 1
        self.window.add(x, result.error, result.n_active, n_left_out, team)
        if state.step % config.log_every == 0 or state.step == config.n_steps:
            self._log(self.window.close(state.step, config, lr, _share_dead(dead, team)))
            self.window = _Window()
        if state.step % config.checkpoint_every == 0 or state.step == config.n_steps:
            save_checkpoint(self.out, self.identity, state, team)

    def finish(self) -> SAE:
        """The SAE in units of the residual stream; saved to the folder."""
        sae = _fold(self.state, self.config, self.metadata, self.team)
        if self.team.rank == 0:
            save_sae(sae, self.out)
        return sae

    def _prepared(self, batch: Batch) -> tuple[Float[Tensor, "kept d_in"], int]:
        """This process' tokens, models side by side and scaled, and how many were left out for their norm."""
        state = self.state
        own = self.team.own_tokens(batch).to(self.device).to(self.dtype)  # fewer bytes travel than in one step
        by_model = own.reshape(len(own), len(state.scale), -1)
        norms: Tensor = torch.linalg.vector_norm(by_model, dim=2)
        where = f"at step {state.step}; the last checkpoint in {self.out} stands"
        _check_finite(norms, where, self.team)
        usual = (norms <= self.config.outlier_factor * state.median_norm).all(1)
        kept = by_model if bool(usual.all()) else by_model[usual]
        return (kept * state.scale[:, None]).flatten(1), len(own) - len(kept)

    def _log(self, progress: Progress) -> None:
        if self.team.rank:
            return
        with (self.out / "train.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(dataclasses.asdict(progress)) + "\n")
        if self.on_progress is not None:
            self.on_progress(progress)


def _identity(config: TrainConfig, metadata: SAEMetadata, steps_per_epoch: int) -> dict[str, Any]:
    """What has to be equal for a run to be continued."""
    activations = {"model_name": metadata.model_name, "site": metadata.site, "steps_per_epoch": steps_per_epoch}
    origin: dict[str, Any] = json.loads(json.dumps(metadata.provenance))
    settings: dict[str, Any] = json.loads(json.dumps(config.as_json()))
    return settings | activations | origin


def _initialise(sample: Batch, config: TrainConfig, team: Team) -> State:
    by_model = sample if sample.ndim == 3 else sample[:, None]
    norms: Tensor = torch.linalg.vector_norm(by_model, dim=2)
    _check_finite(norms, "in the sample that is measured before training", team)
    median_norm = norms.median(0).values
    kept = (norms <= config.outlier_factor * median_norm).all(1)
    flat = by_model[kept].flatten(1)
    d_in = flat.shape[1]
    scale = math.sqrt(by_model.shape[2]) / norms[kept].mean(0)
    generator = torch.Generator().manual_seed(config.seed)
    directions = torch.nn.functional.normalize(torch.randn(config.d_sae, d_in, generator=generator), dim=1)
    directions = team.own_latents(directions.to(flat))
    centre = _geometric_median(flat).view(len(scale), -1) * scale[:, None]
    weights = Weights(
        encoder=directions.clone(),
        W_dec=directions,
        b_enc=directions.new_zeros(len(directions)),
        b_dec=centre.flatten(),
    )
    started, buffers = config.loss.start(weights)
    last_fired = torch.zeros(len(directions), dtype=torch.long, device=flat.device)
    return State.of(started, buffers, last_fired, scale, median_norm)


def _check_finite(norms: Tensor, where: str, team: Team) -> None:
    bad = team.over_both((~torch.isfinite(norms)).sum())
    if bool(bad):
        raise NonFiniteError(f"activations are not finite {where}. Harvest them in bfloat16 or float32")


def _geometric_median(points: Float[Tensor, "token d_in"], *, n_steps: int = 20) -> Float[Tensor, " d_in"]:
    """Weiszfeld's iteration: the point with the least summed distance, which outliers hardly move."""
    centre = points.mean(0)
    for _ in range(n_steps):
        weight = 1 / torch.linalg.vector_norm(points - centre, dim=1).clamp_min(1e-6)
        centre = weight @ points / weight.sum()
    return centre


@torch.no_grad()
def _update(state: State, lr: float, config: TrainConfig, team: Team) -> None:
    """One Adam step; for unit rows on the sphere: no gradient along decoder rows, and rows back to length 1."""
    rows, gradient = state.weights.W_dec, state.grads.W_dec
    if config.loss.unit_norm:
        gradient.addcmul_(rows, torch.linalg.vecdot(gradient, rows)[:, None], value=-1)
    if config.longest_gradient is not None:
        _clip(state.grads, config.longest_gradient, team)
    state.optimizer.param_groups[0]["lr"] = lr
    state.optimizer.step()
    if config.loss.unit_norm:
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def _clip(grads: Weights, longest: float, team: Team) -> None:
    own = torch.stack([torch.linalg.vector_norm(grad) for grad in grads.by_latent().values()]).square().sum()
    norm = (torch.linalg.vector_norm(grads.b_dec).square() + team.over_latents(own)).sqrt()
    for grad in vars(grads).values():
        grad.mul_((longest / (norm + 1e-6)).clamp_max(1))


def _share_dead(dead: Tensor, team: Team) -> float:
    counts = team.over_latents(torch.stack([dead.sum(), dead.new_tensor(len(dead), dtype=torch.long)]))
    return float(counts[0] / counts[1])


@dataclass
class _Window:
    """Sums over the steps of one log line."""

    started: float = dataclasses.field(default_factory=time.perf_counter)
    error: float = 0.0
    variance: float = 0.0
    active: int = 0
    n_tokens: int = 0
    n_left_out: int = 0

    def add(self, x: Tensor, error: Tensor, n_active: Tensor, n_left_out: int, team: Team) -> None:
        figures = torch.stack(
            [
                torch.linalg.vector_norm(error).double().square(),
                torch.linalg.vector_norm(x).double().square(),
                x.new_tensor(len(x), dtype=torch.double),
                x.new_tensor(n_left_out, dtype=torch.double),
            ]
        )
        squared_error, squared, n, n_without = team.over_tokens(figures).tolist()
        total = team.over_tokens(x.sum(0))
        self.error += squared_error
        self.variance += squared - float(total.double().square().sum()) / max(n, 1)
        self.active += int(n_active)
        self.n_tokens += int(n)
        self.n_left_out += int(n_without)

    def close(self, step: int, config: TrainConfig, lr: float, dead: float) -> Progress:
        seen = self.n_tokens + self.n_left_out
        return Progress(
            step=step,
            n_steps=config.n_steps,
            fvu=self.error / max(self.variance, 1e-12),
            l0=self.active / max(self.n_tokens, 1),
            dead=dead,
            outliers=self.n_left_out / seen,
            lr=lr,
            tokens_per_second=seen / (time.perf_counter() - self.started),
        )


def _fold(state: State, config: TrainConfig, metadata: SAEMetadata, team: Team) -> SAE:
    weights = map_latents(state.weights, team.all_latents)
    provenance = {**metadata.provenance, "train": config.as_json(), "versions": versions()}
    median_norm = float(state.median_norm.square().sum().sqrt())
    metadata = dataclasses.replace(metadata, median_norm=median_norm, provenance=provenance)
    scale = state.scale.repeat_interleave(len(weights.b_dec) // len(state.scale))
    length = torch.linalg.vector_norm(weights.W_dec / scale, dim=1).clamp_min(1e-8)  # of rows in units of the stream
    gain = scale * length[:, None]
    if config.loss.unit_norm and len(state.scale) == 1:  # the same without rounding
        length, gain = (1 / state.scale).expand(len(length)), torch.ones_like(gain)
    nonlinearity = config.loss.nonlinearity(weights, state.buffers, length).float().cpu()
    sae = SAE(len(scale), len(length), nonlinearity, metadata=metadata)
    with torch.no_grad():
        sae.encoder.copy_(weights.encoder * gain)
        sae.W_dec.copy_(weights.W_dec / gain)
        sae.b_enc.copy_(weights.b_enc * length)
        sae.b_dec.copy_(weights.b_dec / scale)
    return sae.eval().requires_grad_(False)


def _trim_log(file: Path, step: int) -> None:
    """Drop log lines of steps that will be done again."""
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(line for line in lines if _logged_step(line) <= step), encoding="utf-8")


def _logged_step(line: str) -> float:
    try:
        step: Any = json.loads(line)["step"]
        return float(step)
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that a kill cut short
