"""Everything that a training run needs to go on, in one file that is replaced whole."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.errors import InputError, IntegrityError
from saetools.room import enough_room
from saetools.sae.objective import AnyLoss
from saetools.sae.weights import Weights, empty_like, map_latents
from saetools.team import Team

_NAME = "checkpoint.safetensors"
_MOMENTS = "exp_avg", "exp_avg_sq"  # of Adam


@dataclass
class State:
    """What training changes.

    Args:
        weights: of the latents of this process.
        grads: overwritten in every step.
        buffers: running figures of the loss.
        optimizer: Adam over the weights.
        last_fired: tokens seen since each latent fired.
        scale: per model, what inputs are multiplied by, so that their mean norm is sqrt(d_model).
        median_norm: per model, of its residual stream.
        step: steps done.
    """

    weights: Weights
    grads: Weights
    buffers: dict[str, Tensor]
    optimizer: torch.optim.Adam
    last_fired: Int[Tensor, " d_sae"]
    scale: Float[Tensor, " model"]
    median_norm: Float[Tensor, " model"]
    step: int = 0

    @classmethod
    def of(
        cls,
        weights: Weights,
        buffers: dict[str, Tensor],
        last_fired: Tensor,
        scale: Tensor,
        median_norm: Tensor,
        step: int = 0,
    ) -> State:
        """With gradients and an optimiser."""
        grads = empty_like(weights)
        for weight, grad in zip(vars(weights).values(), vars(grads).values(), strict=True):
            weight.grad = grad
        optimizer = torch.optim.Adam(list(vars(weights).values()), lr=0.0, betas=(0.9, 0.999), fused=True)
        return cls(weights, grads, buffers, optimizer, last_fired, scale, median_norm, step)


def save_checkpoint(out: Path, identity: Mapping[str, Any], state: State, team: Team) -> None:
    """Replace the checkpoint of a folder by the state of all processes.

    Raises:
        ResourceError: if the disk is full; the last checkpoint stays.
    """
    weights, adam = state.weights, state.optimizer.state
    parts = {"weights": weights}
    for moment in _MOMENTS:
        parts[f"adam.{moment}"] = type(weights)(*(adam[weight][moment] for weight in vars(weights).values()))
    tensors: dict[str, Tensor] = {}
    for part, own in parts.items():
        whole = map_latents(own, team.all_latents)
        tensors |= {f"{part}.{name}": tensor.detach() for name, tensor in vars(whole).items()}
    tensors |= {f"buffers.{name}": value for name, value in state.buffers.items()}
    tensors |= {"last_fired": team.all_latents(state.last_fired)}
    tensors |= {"scale": state.scale, "median_norm": state.median_norm}
    problem: Exception | None = None
    if team.rank == 0:
        try:
            _write(out, tensors, {"step": str(state.step), "config": json.dumps(identity)})
        except Exception as error:
            problem = error
    team.agree(problem)


def load_checkpoint(
    out: Path, identity: Mapping[str, Any], loss: AnyLoss, device: torch.device | str, team: Team
) -> State | None:
    """The state that a folder holds, or this process' part of it; `None` if it holds none.

    Raises:
        InputError: if it is that of another run.
        IntegrityError: if it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    file = out / _NAME
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
        names = [field.name for field in dataclasses.fields(loss.weights_type)]

        def own(part: str) -> Weights:
            whole = loss.weights_type(**{name: tensors[f"{part}.{name}"] for name in names})
            return map_latents(whole, team.own_latents)

        weights, moments = own("weights"), {moment: own(f"adam.{moment}") for moment in _MOMENTS}
        buffers = {name.removeprefix("buffers."): tensors[name] for name in tensors if name.startswith("buffers.")}
        last_fired, step = team.own_latents(tensors["last_fired"]), int(facts["step"])
        state = State.of(weights, buffers, last_fired, tensors["scale"], tensors["median_norm"], step)
        for name, weight in vars(weights).items():
            state.optimizer.state[weight] = {
                "step": torch.tensor(float(state.step), device=device),
                **{moment: getattr(of_weights, name) for moment, of_weights in moments.items()},
            }
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise IntegrityError(f"{file} is damaged ({error}); delete it to start again") from error
    return state


def _write(out: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    from safetensors.torch import save_file

    temporary = out / ".checkpoint.tmp"
    try:
        with enough_room(f"a checkpoint in {out}; the last one stands"):
            save_file(tensors, temporary, metadata=facts)
        temporary.replace(out / _NAME)
    finally:
        temporary.unlink(missing_ok=True)
