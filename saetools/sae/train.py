"""Training an SAE on stored activations: one loop, read top to bottom."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.errors import InputError, IntegrityError, NonFiniteError
from saetools.provenance import versions
from saetools.sae.io import save_sae
from saetools.sae.model import SAE, SAEMetadata
from saetools.sae.objective import AnyLoss, StepContext, TopKLoss
from saetools.sae.weights import Weights, empty_like


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run."""

    d_sae: int = 8192
    """Number of latents."""
    loss: AnyLoss = TopKLoss()
    """What kind of SAE, and how sparse."""
    n_tokens: int = 10_000_000
    """Tokens to train on in all; the data is gone through as often as that takes."""
    batch_size: int = 4096
    """Tokens a step."""
    lr: float = 8e-4
    """Peak learning rate of Adam."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    decay_fraction: float = 0.3
    """Last part of the run over which the learning rate falls to 0."""
    decay: Literal["linear", "cosine"] = "linear"
    """How it falls."""
    clip_norm: float | None = None
    """Longest gradient, over all weights together; `None` leaves gradients alone."""
    dead_after_tokens: int = 400_000
    """A latent that has not fired for so many tokens is dead."""
    outlier_factor: float = 8.0
    """Tokens with more than this multiple of the median norm are left out (and counted)."""
    encode_dtype: str = "bfloat16"
    """Dtype of the encoder product; sparse losses compute the values of the latents it chooses in float32. `int8` is
    for `TopKLoss` on CPUs, where it is the fastest: it takes a few more candidates, which make up for its rounding."""
    seed: int = 0
    """Of initial weights and data order."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    log_every: int = 25
    """Steps between lines of the log."""

    def as_json(self) -> dict[str, Any]:
        """All settings, with the name of the loss."""
        return {**dataclasses.asdict(self), "loss": {"kind": type(self.loss).__name__, **vars(self.loss)}}


@runtime_checkable
class ActivationSource(Protocol):
    """What the loop trains on: epochs of shuffled batches that can be entered anywhere."""

    def n_batches(self, batch_size: int) -> int:
        """Batches of one epoch."""
        ...

    def epoch_batches(
        self, batch_size: int, *, seed: int, epoch: int = 0, start: int = 0
    ) -> Iterator[Float[Tensor, "batch d_model"]]:
        """The batches of an epoch from number `start` on; equal arguments give equal batches."""
        ...

    def sample(self, n_tokens: int, *, seed: int) -> Float[Tensor, "token d_model"]:
        """Random tokens, to measure norms and mean."""
        ...


@dataclass(frozen=True)
class Progress:
    """Figures over the steps since the last log line."""

    step: int
    n_steps: int
    fvu: float
    """Fraction of variance unexplained."""
    l0: float
    """Mean active latents a token."""
    dead: float
    """Share of dead latents."""
    outliers: float
    """Share of tokens left out for their norm."""
    lr: float
    tokens_per_second: float


@dataclass
class _State:
    weights: Weights
    grads: Weights  # overwritten in every step
    buffers: dict[str, Tensor]  # running figures of the loss
    optimizer: torch.optim.Adam
    last_fired: Tensor  # tokens seen since each latent fired
    scale: float  # inputs are multiplied by this, so that their mean norm is sqrt(d_model)
    median_norm: float
    step: int = 0


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

    Args:
        source: activations, such as `store.at(site)`.
        config: settings.
        out: folder for the SAE (SAELens' format), `train.jsonl` (the log) and `checkpoint.safetensors`.
        metadata: what the activations are; `median_norm` and the settings are added.
        on_progress: called with every line of the log.
        device: where to train.

    Raises:
        InputError: if the folder holds a run with other settings or on other activations.
        IntegrityError: if its checkpoint is damaged.
        NonFiniteError: if an activation or the loss is not finite; the last checkpoint stays.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> texts = [Conversation(text=pair.neutral) for pair in load_voices()[:4]]
        >>> store = harvest(lm, [Site(1)], list(tokenize(texts, lm.tokenizer)), folder + "/store")
        >>> config = TrainConfig(d_sae=64, loss=TopKLoss(k=4), batch_size=64, n_tokens=640)
        >>> train_sae(store.at(Site(1)), config, folder + "/sae").d_sae
        64
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _check_positive(config)
    steps_per_epoch = source.n_batches(config.batch_size)
    n_steps = config.n_tokens // config.batch_size
    _check(config, steps_per_epoch, n_steps, device)
    identity = _identity(config, metadata, steps_per_epoch)
    state = _load_checkpoint(out, identity, config.loss, device) or _initialise(source, config, device)
    _trim_log(out / "train.jsonl", state.step)
    window = _Window(state.step)
    encode_dtype = getattr(torch, config.encode_dtype)

    while state.step < n_steps:
        epoch, start = divmod(state.step, steps_per_epoch)
        for batch in source.epoch_batches(config.batch_size, seed=config.seed, epoch=epoch, start=start):
            x = batch.to(device, torch.float32)
            norms = _finite_norms(x, f"at step {state.step}; the last checkpoint in {out} stands")
            x = x[norms <= config.outlier_factor * state.median_norm].mul_(state.scale)
            dead = state.last_fired >= config.dead_after_tokens
            context = StepContext(dead, encode_dtype, state.step, state.buffers)
            result = config.loss.step(x, state.weights, state.grads, context)
            if not bool(torch.isfinite(result.loss)):
                raise NonFiniteError(
                    f"the loss is not finite at step {state.step}; the last checkpoint in {out} stands. Lower lr"
                )
            lr = _learning_rate(config, state.step, n_steps)
            _update(state, lr, config)
            state.last_fired.add_(len(x)).masked_fill_(result.fired, 0)
            state.step += 1
            window.add(x, result.error, result.n_active, dead, n_left_out=len(batch) - len(x))
            if state.step % config.log_every == 0 or state.step == n_steps:
                progress = window.close(state.step, n_steps, lr)
                with (out / "train.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(dataclasses.asdict(progress)) + "\n")
                if on_progress is not None:
                    on_progress(progress)
            if state.step % config.checkpoint_every == 0 or state.step == n_steps:
                _save_checkpoint(out, identity, state)
            if state.step == n_steps:
                break

    sae = _fold(state, config, metadata)
    save_sae(sae, out)
    return sae


def _check_positive(config: TrainConfig) -> None:
    for name in ("d_sae", "n_tokens", "batch_size", "lr", "checkpoint_every", "log_every", "outlier_factor"):
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise InputError(f"config.{name}", expected="a finite number above 0", received=value, remedy="raise it")
    if not 0 <= config.decay_fraction <= 1:
        received = config.decay_fraction
        raise InputError("config.decay_fraction", expected="0 to 1", received=received, remedy="pick a share")
    if config.clip_norm is not None and not config.clip_norm > 0:
        raise InputError("config.clip_norm", expected="more than 0", received=config.clip_norm, remedy="raise it")


def _check(config: TrainConfig, steps_per_epoch: int, n_steps: int, device: torch.device | str) -> None:
    if steps_per_epoch < 1 or n_steps < 1:
        raise InputError(
            "config.batch_size",
            expected="at most the tokens there are and the tokens to train on",
            received=config.batch_size,
            remedy="lower batch_size, or harvest more",
        )
    allowed = config.loss.encode_dtypes
    if config.encode_dtype not in allowed:
        raise InputError(
            "config.encode_dtype",
            expected=f"{' or '.join(allowed)} for {type(config.loss).__name__}",
            received=repr(config.encode_dtype),
            remedy="pick one",
        )
    if config.encode_dtype == "int8" and torch.device(device).type != "cpu":
        raise InputError(
            "config.encode_dtype",
            expected=f"float32 or bfloat16 on {device}",
            received="'int8'",
            remedy="pick bfloat16; int8 pays on CPUs",
        )
    config.loss.check(config.d_sae)


def _identity(config: TrainConfig, metadata: SAEMetadata, steps_per_epoch: int) -> dict[str, Any]:
    """What has to be equal for a run to be continued."""
    activations = {"model_name": metadata.model_name, "site": metadata.site, "steps_per_epoch": steps_per_epoch}
    origin: dict[str, Any] = json.loads(json.dumps(metadata.provenance))
    settings: dict[str, Any] = json.loads(json.dumps(config.as_json()))
    return settings | activations | origin


def _initialise(source: ActivationSource, config: TrainConfig, device: torch.device | str) -> _State:
    sample = source.sample(65536, seed=config.seed).to(device, torch.float32)
    norms = _finite_norms(sample, "in the sample that is measured before training")
    median_norm = float(norms.median())
    kept = norms <= config.outlier_factor * median_norm
    sample = sample[kept]
    d_in = sample.shape[1]
    scale = math.sqrt(d_in) / float(norms[kept].mean())
    generator = torch.Generator().manual_seed(config.seed)
    directions = torch.nn.functional.normalize(torch.randn(config.d_sae, d_in, generator=generator), dim=1).to(device)
    weights = Weights(
        encoder=directions.clone(),
        W_dec=directions,
        b_enc=torch.zeros(config.d_sae, device=device),
        b_dec=_geometric_median(sample).mul_(scale),
    )
    started, buffers = config.loss.start(weights)
    last_fired = torch.zeros(config.d_sae, dtype=torch.long, device=device)
    return _state(started, buffers, last_fired, scale, median_norm)


def _finite_norms(x: Float[Tensor, "token d_in"], where: str) -> Float[Tensor, " token"]:
    norms: Tensor = torch.linalg.vector_norm(x, dim=1)
    if not bool(torch.isfinite(norms).all()):
        raise NonFiniteError(f"activations are not finite {where}. Harvest them in bfloat16 or float32")
    return norms


def _geometric_median(points: Float[Tensor, "token d_in"], *, n_steps: int = 20) -> Float[Tensor, " d_in"]:
    """Weiszfeld's iteration: the point with the least summed distance, which outliers hardly move."""
    centre = points.mean(0)
    for _ in range(n_steps):
        weight = 1 / torch.linalg.vector_norm(points - centre, dim=1).clamp_min(1e-6)
        centre = weight @ points / weight.sum()
    return centre


def _state(
    weights: Weights,
    buffers: dict[str, Tensor],
    last_fired: Tensor,
    scale: float,
    median_norm: float,
    step: int = 0,
) -> _State:
    grads = empty_like(weights)
    for weight, grad in zip(vars(weights).values(), vars(grads).values(), strict=True):
        weight.grad = grad
    return _State(weights, grads, buffers, _adam(weights), last_fired, scale, median_norm, step)


def _adam(weights: Weights) -> torch.optim.Adam:
    return torch.optim.Adam(list(vars(weights).values()), lr=0.0, betas=(0.9, 0.999), fused=True)


def _learning_rate(config: TrainConfig, step: int, n_steps: int) -> float:
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = max(1, round(config.decay_fraction * n_steps))
    left = min(1.0, (n_steps - step) / decay_steps)
    return config.lr * warm * (left if config.decay == "linear" else (1 - math.cos(math.pi * left)) / 2)


@torch.no_grad()
def _update(state: _State, lr: float, config: TrainConfig) -> None:
    """One Adam step; for unit rows on the sphere: no gradient along decoder rows, and rows back to length 1."""
    rows, gradient = state.weights.W_dec, state.grads.W_dec
    if config.loss.unit_norm:
        gradient.addcmul_(rows, torch.linalg.vecdot(gradient, rows)[:, None], value=-1)
    if config.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(list(vars(state.weights).values()), config.clip_norm)
    state.optimizer.param_groups[0]["lr"] = lr
    state.optimizer.step()
    if config.loss.unit_norm:
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


class _Window:
    """Sums over the steps of one log line."""

    def __init__(self, step: int) -> None:
        self._reset(step)

    def _reset(self, step: int) -> None:
        self.first, self.started = step, time.perf_counter()
        self.error = self.variance = self.active = 0.0
        self.n_tokens = self.n_left_out = 0
        self.dead = 0.0

    def add(self, x: Tensor, error: Tensor, n_active: Tensor, dead: Tensor, *, n_left_out: int) -> None:
        self.error += float(torch.linalg.vector_norm(error)) ** 2
        self.variance += float(torch.linalg.vector_norm(x)) ** 2 - len(x) * float(x.mean(0).square().sum())
        self.active += int(n_active)
        self.n_tokens += len(x)
        self.n_left_out += n_left_out
        self.dead = float(dead.float().mean())

    def close(self, step: int, n_steps: int, lr: float) -> Progress:
        seen = self.n_tokens + self.n_left_out
        progress = Progress(
            step=step,
            n_steps=n_steps,
            fvu=self.error / max(self.variance, 1e-12),
            l0=self.active / max(self.n_tokens, 1),
            dead=self.dead,
            outliers=self.n_left_out / seen,
            lr=lr,
            tokens_per_second=seen / (time.perf_counter() - self.started),
        )
        self._reset(step)
        return progress


def _fold(state: _State, config: TrainConfig, metadata: SAEMetadata) -> SAE:
    d_sae, d_in = state.weights.W_dec.shape
    provenance = {**metadata.provenance, "train": config.as_json(), "versions": versions()}
    metadata = dataclasses.replace(metadata, median_norm=state.median_norm, provenance=provenance)
    weights, norms = state.weights, torch.linalg.vector_norm(state.weights.W_dec, dim=1)
    norms = torch.ones_like(norms) if config.loss.unit_norm else norms.clamp_min(1e-8)
    unit = norms / state.scale  # of a latent's activation, in units of the residual stream
    sae = SAE(d_in, d_sae, config.loss.nonlinearity(weights, state.buffers, unit).cpu(), metadata=metadata)
    with torch.no_grad():
        sae.encoder.copy_(weights.encoder * norms[:, None])
        sae.W_dec.copy_(weights.W_dec / norms[:, None])
        sae.b_enc.copy_(weights.b_enc * unit)
        sae.b_dec.copy_(weights.b_dec / state.scale)
    return sae.eval().requires_grad_(False)


def _save_checkpoint(out: Path, identity: Mapping[str, Any], state: _State) -> None:
    from safetensors.torch import save_file

    tensors = {f"weights.{name}": weight.detach() for name, weight in vars(state.weights).items()}
    for name, weight in vars(state.weights).items():
        slot = state.optimizer.state[weight]
        tensors |= {f"adam.{name}.exp_avg": slot["exp_avg"], f"adam.{name}.exp_avg_sq": slot["exp_avg_sq"]}
    tensors |= {f"buffers.{name}": value for name, value in state.buffers.items()}
    tensors["last_fired"] = state.last_fired
    facts = {
        "step": str(state.step),
        "scale": state.scale.hex(),
        "median_norm": state.median_norm.hex(),
        "config": json.dumps(identity),
    }
    temporary = out / ".checkpoint.tmp"
    try:
        save_file(tensors, temporary, metadata=facts)
        temporary.replace(out / "checkpoint.safetensors")
    finally:
        temporary.unlink(missing_ok=True)


def _load_checkpoint(
    out: Path, identity: Mapping[str, Any], loss: AnyLoss, device: torch.device | str
) -> _State | None:
    from safetensors import SafetensorError, safe_open

    file = out / "checkpoint.safetensors"
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            facts: dict[str, str] = stored.metadata()
            tensors = {name: stored.get_tensor(name).clone().to(device) for name in stored.keys()}  # noqa: SIM118
        theirs = json.loads(facts["config"])
        different = [name for name, value in identity.items() if theirs.get(name) != value]
        if different:
            raise InputError(
                "out",
                expected="an empty folder or a run with equal settings",
                received=f"{out}, where {', '.join(different)} differ",
                remedy="choose another folder",
            )
        kind = loss.weights_type
        weights = kind(**{field.name: tensors[f"weights.{field.name}"] for field in dataclasses.fields(kind)})
        buffers = {name.removeprefix("buffers."): tensors[name] for name in tensors if name.startswith("buffers.")}
        scale, median_norm = float.fromhex(facts["scale"]), float.fromhex(facts["median_norm"])
        state = _state(weights, buffers, tensors["last_fired"], scale, median_norm, int(facts["step"]))
        for name, weight in vars(weights).items():
            state.optimizer.state[weight] = {
                "step": torch.tensor(float(state.step), device=device),
                "exp_avg": tensors[f"adam.{name}.exp_avg"],
                "exp_avg_sq": tensors[f"adam.{name}.exp_avg_sq"],
            }
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise IntegrityError(f"{file} is damaged ({error}); delete it to start again") from error
    return state


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
