"""Training a TopK SAE on stored activations: one loop, read top to bottom."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.errors import InputError, IntegrityError, NonFiniteError
from saetools.provenance import versions
from saetools.sae.io import save_sae
from saetools.sae.loss import Weights, topk_step
from saetools.sae.model import SAE, SAEMetadata
from saetools.sae.nonlinearity import TopK


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run."""

    d_sae: int = 8192
    """Number of latents."""
    k: int = 32
    """Active latents a token."""
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
    k_aux: int = 256
    """Dead latents that learn from each token's error."""
    aux_coefficient: float = 1 / 32
    """Weight of that loss."""
    dead_after_tokens: int = 400_000
    """A latent that has not fired for so many tokens is dead."""
    outlier_factor: float = 8.0
    """Tokens with more than this multiple of the median norm are left out (and counted)."""
    encode_dtype: str = "bfloat16"
    """Dtype of the product that chooses latents; their values are always computed in float32."""
    seed: int = 0
    """Of initial weights and data order."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    log_every: int = 25
    """Steps between lines of the log."""


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
    """Train a TopK SAE; a run that was killed goes on from its last checkpoint, to the same bytes.

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
        >>> config = TrainConfig(d_sae=64, k=4, batch_size=64, n_tokens=640)
        >>> train_sae(store.at(Site(1)), config, folder + "/sae").d_sae
        64
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    steps_per_epoch = source.n_batches(config.batch_size)
    n_steps = config.n_tokens // config.batch_size
    _check(config, steps_per_epoch, n_steps)
    identity = _identity(config, metadata, steps_per_epoch)
    state = _load_checkpoint(out, identity, device) or _initialise(source, config, device)
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
            result = topk_step(
                x,
                state.weights,
                config.k,
                encode_dtype=encode_dtype,
                dead=dead,
                k_aux=config.k_aux,
                aux_coefficient=config.aux_coefficient,
                grads=state.grads,
            )
            if not bool(torch.isfinite(result.loss)):
                raise NonFiniteError(
                    f"the loss is not finite at step {state.step}; the last checkpoint in {out} stands. Lower lr"
                )
            lr = _learning_rate(config, state.step, n_steps)
            _update(state, lr)
            fired = torch.bincount(result.indices.flatten(), result.values.flatten(), minlength=config.d_sae) > 0
            state.last_fired.add_(len(x)).masked_fill_(fired, 0)
            state.step += 1
            window.add(x, result.error, result.values, dead, n_left_out=len(batch) - len(x))
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


def _check(config: TrainConfig, steps_per_epoch: int, n_steps: int) -> None:
    if steps_per_epoch < 1 or n_steps < 1:
        raise InputError(
            "config.batch_size",
            expected="at most the tokens there are and the tokens to train on",
            received=config.batch_size,
            remedy="lower batch_size, or harvest more",
        )
    if config.encode_dtype not in ("float32", "bfloat16"):
        raise InputError(
            "config.encode_dtype", expected="float32 or bfloat16", received=repr(config.encode_dtype), remedy="pick one"
        )
    if config.k > config.d_sae:
        raise InputError("config.k", expected=f"at most d_sae = {config.d_sae}", received=config.k, remedy="lower k")


def _identity(config: TrainConfig, metadata: SAEMetadata, steps_per_epoch: int) -> dict[str, Any]:
    """What has to be equal for a run to be continued."""
    activations = {"model_name": metadata.model_name, "site": metadata.site, "steps_per_epoch": steps_per_epoch}
    origin: dict[str, Any] = json.loads(json.dumps(metadata.provenance))
    return dataclasses.asdict(config) | activations | origin


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
    last_fired = torch.zeros(config.d_sae, dtype=torch.long, device=device)
    return _state(weights, last_fired, scale, median_norm)


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


def _state(weights: Weights, last_fired: Tensor, scale: float, median_norm: float, step: int = 0) -> _State:
    grads = weights.empty_like()
    for weight, grad in zip(vars(weights).values(), vars(grads).values(), strict=True):
        weight.grad = grad
    return _State(weights, grads, _adam(weights), last_fired, scale, median_norm, step)


def _adam(weights: Weights) -> torch.optim.Adam:
    return torch.optim.Adam(list(vars(weights).values()), lr=0.0, betas=(0.9, 0.999), fused=True)


def _learning_rate(config: TrainConfig, step: int, n_steps: int) -> float:
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = max(1, round(config.decay_fraction * n_steps))
    return config.lr * warm * min(1.0, (n_steps - step) / decay_steps)


@torch.no_grad()
def _update(state: _State, lr: float) -> None:
    """One Adam step on the sphere: no gradient along decoder rows, and rows back to length 1."""
    rows, gradient = state.weights.W_dec, state.grads.W_dec
    gradient.addcmul_(rows, torch.linalg.vecdot(gradient, rows)[:, None], value=-1)
    state.optimizer.param_groups[0]["lr"] = lr
    state.optimizer.step()
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

    def add(self, x: Tensor, error: Tensor, values: Tensor, dead: Tensor, *, n_left_out: int) -> None:
        self.error += float(torch.linalg.vector_norm(error)) ** 2
        self.variance += float(torch.linalg.vector_norm(x)) ** 2 - len(x) * float(x.mean(0).square().sum())
        self.active += int((values > 0).sum())
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
    provenance = {**metadata.provenance, "train": dataclasses.asdict(config), "versions": versions()}
    metadata = dataclasses.replace(metadata, median_norm=state.median_norm, provenance=provenance)
    sae = SAE(d_in, d_sae, TopK(config.k), metadata=metadata)
    with torch.no_grad():
        sae.encoder.copy_(state.weights.encoder)
        sae.W_dec.copy_(state.weights.W_dec)
        sae.b_enc.copy_(state.weights.b_enc / state.scale)
        sae.b_dec.copy_(state.weights.b_dec / state.scale)
    return sae.eval().requires_grad_(False)


def _save_checkpoint(out: Path, identity: Mapping[str, Any], state: _State) -> None:
    from safetensors.torch import save_file

    tensors = {f"weights.{name}": weight.detach() for name, weight in vars(state.weights).items()}
    for name, weight in vars(state.weights).items():
        slot = state.optimizer.state[weight]
        tensors |= {f"adam.{name}.exp_avg": slot["exp_avg"], f"adam.{name}.exp_avg_sq": slot["exp_avg_sq"]}
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


def _load_checkpoint(out: Path, identity: Mapping[str, Any], device: torch.device | str) -> _State | None:
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
        weights = Weights(**{name: tensors[f"weights.{name}"] for name in Weights.__dataclass_fields__})
        scale, median_norm = float.fromhex(facts["scale"]), float.fromhex(facts["median_norm"])
        state = _state(weights, tensors["last_fired"], scale, median_norm, int(facts["step"]))
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
