"""Edits of the residual stream: on latents of an SAE, leaving its error alone, and on directions.

Each function returns an `Edit` for `saetools.edit`, `generate` and the evaluations; it prints as what it does.

| edit | f'_j or x' | where latent j is inactive |
|---|---|---|
| `add(sae, j, s)` | x + s m d_j, m the median residual norm, d_j the unit decoder row | the same |
| `clamp(sae, j, c)` | f'_j = c | also f'_j = c (unless `only_if_active`) |
| `scale(sae, j, a)` | f'_j = a f_j | nothing happens |
| `ablate(sae, j)` | f'_j = 0 | nothing happens |
| `add_direction(v, s)` | x + s v | |
| `project_out(v)` | x - v v.x / v.v | |

Latent edits compute x + (decode(f') - decode(f)): what the SAE does not explain stays, and where f' = f nothing
changes, bit for bit. The first position of a context, an attention sink, is left alone unless `skip_first=False`.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saetools.data.roles import select_positions
from saetools.errors import InputError
from saetools.models.editing import Edit, Where
from saetools.sae.model import SAE

Tokens = Literal["all", "prompt", "response"]
Latents = int | Sequence[int] | Int[Tensor, " latent"]


@dataclass(frozen=True)
class Scope:
    """Which tokens an edit touches.

    Args:
        tokens: `all`; `response`: assistant content; `prompt`: everything else (template included).
        skip_first: leave the first non-padding position alone.
    """

    tokens: Tokens = "all"
    skip_first: bool = True

    def __post_init__(self) -> None:
        if self.tokens not in ("all", "prompt", "response"):
            raise InputError(
                "tokens", expected="all, prompt or response", received=repr(self.tokens), remedy="pick one of these"
            )

    def __call__(self, where: Where) -> Bool[Tensor, "row pos"]:
        """The tokens of a pass that are to be edited.

        Raises:
            InputError: for a scope by role where roles are not known.
        """
        chosen = where.mask & (where.positions > 0) if self.skip_first else where.mask
        if self.tokens == "all":
            return chosen
        if where.roles is None:
            raise InputError(
                "tokens",
                expected="'all', or the roles of the batch",
                received=f"{self.tokens!r} without roles",
                remedy="pass roles=batch.roles to saetools.edit",
            )
        response = select_positions(where.roles, "response")
        return chosen & (response if self.tokens == "response" else ~response)


@dataclass(frozen=True, eq=False)
class LatentEdit:
    """x + (decode(f') - decode(f)), with f' = change(f) on some latents of an SAE."""

    sae: SAE
    latents: Int[Tensor, " latent"]
    change: Callable[[Float[Tensor, "token latent"]], Float[Tensor, "token latent"]]
    scope: Scope
    description: str

    def __call__(self, acts: Tensor, where: Where) -> Tensor:
        """Edit the activations of a pass."""
        chosen = self.scope(where)
        x = acts[chosen]
        sae = placed(self.sae, acts.device)
        latents = self.latents.to(acts.device)
        f = sae.encode(x.detach()).of(latents)
        change = (self.change(f) - f) @ sae.W_dec.detach()[latents] * sae.output_scale(x.detach())
        return acts.masked_scatter(chosen[..., None], (x + change).to(acts.dtype))

    def __repr__(self) -> str:
        return _describe(self.description, self.scope)


@dataclass(frozen=True, eq=False)
class DirectionEdit:
    """x' = change(x, direction), in float32 or better."""

    direction: Float[Tensor, " d_model"]
    change: Callable[[Float[Tensor, "*token d_model"], Float[Tensor, " d_model"]], Float[Tensor, "*token d_model"]]
    scope: Scope
    description: str

    def __call__(self, acts: Tensor, where: Where) -> Tensor:
        """Edit the activations of a pass."""
        if acts.shape[-1] != len(self.direction):
            raise InputError(
                "direction",
                expected=f"length {acts.shape[-1]}, the width of the residual stream",
                received=len(self.direction),
                remedy="pass a direction of this model",
            )
        chosen = self.scope(where)[..., None]
        direction = self.direction.to(acts.device)
        x = acts.to(torch.promote_types(acts.dtype, direction.dtype))
        return torch.where(chosen, x + self.change(x, direction), x).to(acts.dtype)

    def __repr__(self) -> str:
        return _describe(self.description, self.scope)


def add(sae: SAE, latents: Latents, strength: float, *, tokens: Tokens = "all", skip_first: bool = True) -> Edit:
    """Add s times the median residual norm along the unit decoder row of each latent (arXiv 2506.19823).

    Args:
        sae: an SAE whose metadata holds the median norm.
        latents: one or several.
        strength: s, usually within [-0.5, 0.5].
        tokens: `all`, `prompt` or `response`.
        skip_first: leave the first position alone.

    Raises:
        InputError: for a latent that does not exist, an SAE without a median norm, or a strength that is not finite.
    """
    chosen = _check_latents(sae, latents)
    rows = sae.W_dec.detach()[chosen.to(sae.W_dec.device)]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    step = _finite("strength", strength) * median_norm(sae) * torch.nn.functional.normalize(rows, dim=1).sum(0)
    return DirectionEdit(
        step,
        lambda x, v: v.expand_as(x),
        Scope(tokens, skip_first),
        f"add {strength:g} x median norm along {_name(chosen)}",
    )


def clamp(
    sae: SAE,
    latents: Latents,
    value: float | Sequence[float],
    *,
    unit: Literal["activation", "p99"] = "activation",
    only_if_active: bool = False,
    tokens: Tokens = "all",
    skip_first: bool = True,
) -> Edit:
    """Set latents to a value on every token, also where they are inactive or outside the top k.

    Args:
        sae: the SAE.
        latents: one or several.
        value: the activation to set, for all or for each of them.
        unit: `activation`: in units of the unscaled residual stream; `p99`: in multiples of each latent's 99th
            percentile where it is active, on the SAE's reference corpus.
        only_if_active: leave tokens alone on which a latent is inactive.
        tokens: `all`, `prompt` or `response`.
        skip_first: leave the first position alone.

    Raises:
        InputError: for a latent that does not exist, values that are not finite or do not fit the number of latents,
            or an SAE without 99th percentiles.
    """
    chosen = _check_latents(sae, latents)
    values = torch.as_tensor(value, dtype=torch.promote_types(sae.W_dec.dtype, torch.float32)).cpu()
    if values.ndim > 1 or (values.ndim == 1 and len(values) != len(chosen)) or not bool(torch.isfinite(values).all()):
        raise InputError(
            "value",
            expected="finite numbers, one for all latents or one for each",
            received=value,
            remedy=f"give one, or {len(chosen)}",
        )
    values = values.expand(len(chosen))
    if unit not in ("activation", "p99"):
        raise InputError("unit", expected="activation or p99", received=repr(unit), remedy="pick one of these")
    if unit == "p99":
        if sae.p99 is None:
            raise InputError(
                "unit",
                expected="activation, for an SAE without latent statistics",
                received="'p99'",
                remedy="measure them: saetools.measure_latents",
            )
        values = values * sae.p99.cpu()[chosen]

    def change(f: Tensor) -> Tensor:
        target = values.to(f).expand_as(f)
        return torch.where(f > 0, target, f) if only_if_active else target

    suffix = (" x p99" if unit == "p99" else "") + (" where active" if only_if_active else "")
    target = ", ".join(f"{each:g}" for each in torch.as_tensor(value).reshape(-1).tolist())
    return LatentEdit(sae, chosen, change, Scope(tokens, skip_first), f"clamp {_name(chosen)} to {target}{suffix}")


def scale(sae: SAE, latents: Latents, factor: float, *, tokens: Tokens = "all", skip_first: bool = True) -> Edit:
    """Multiply the activations of latents; 1 changes nothing, 0 is `ablate`.

    Raises:
        InputError: for a latent that does not exist, or a factor that is not finite.
    """
    chosen = _check_latents(sae, latents)
    factor = _finite("factor", factor)
    return LatentEdit(
        sae, chosen, lambda f: f * factor, Scope(tokens, skip_first), f"scale {_name(chosen)} by {factor:g}"
    )


def ablate(sae: SAE, latents: Latents, *, tokens: Tokens = "all", skip_first: bool = True) -> Edit:
    """Set latents to 0 wherever they are active.

    Raises:
        InputError: for a latent that does not exist.
    """
    chosen = _check_latents(sae, latents)
    return LatentEdit(sae, chosen, torch.zeros_like, Scope(tokens, skip_first), f"ablate {_name(chosen)}")


def add_direction(
    direction: Float[Tensor, " d_model"], strength: float, *, tokens: Tokens = "all", skip_first: bool = True
) -> Edit:
    """Add strength times a direction, in the direction's own units (arXiv 2506.11618).

    For a share of the typical residual norm, pass a unit vector and strength times `sae.metadata.median_norm`.

    Raises:
        InputError: if the direction is not a finite vector, or the strength not a finite number.
    """
    step = _finite("strength", strength) * _check_direction(direction)
    return DirectionEdit(
        step,
        lambda x, v: v.expand_as(x),
        Scope(tokens, skip_first),
        f"add {strength:g} x a direction of norm {float(direction.norm()):g}",
    )


def project_out(direction: Float[Tensor, " d_model"], *, tokens: Tokens = "all", skip_first: bool = True) -> Edit:
    """Remove the component along a direction: x - v v.x / v.v (arXiv 2506.11618).

    Raises:
        InputError: if the direction is zero or not finite.
    """
    vector = _check_direction(direction)
    if not bool(vector.any()):
        raise InputError("direction", expected="a direction", received="a zero vector", remedy="pass another")
    unit = vector / vector.norm()
    return DirectionEdit(
        unit, lambda x, v: -(x @ v)[..., None] * v, Scope(tokens, skip_first), "project out a direction"
    )


def median_norm(sae: SAE) -> float:
    """The unit of steering strength: the median residual norm at the SAE's site on its base model.

    Raises:
        InputError: if the SAE's metadata does not hold it.
    """
    if sae.metadata.median_norm is None:
        raise InputError(
            "sae",
            expected="metadata with the median residual norm",
            received="none",
            remedy="measure it: saetools.measure_latents",
        )
    return sae.metadata.median_norm


_COPIES: weakref.WeakKeyDictionary[SAE, dict[torch.device, SAE]] = weakref.WeakKeyDictionary()


def placed(sae: SAE, device: torch.device) -> SAE:
    """The SAE on a device; copies are kept as long as the original lives."""
    if sae.W_dec.device == device:
        return sae
    copies = _COPIES.setdefault(sae, {})
    if device not in copies:
        copies[device] = copy.deepcopy(sae).to(device)
    return copies[device]


def _check_latents(sae: SAE, latents: Latents) -> Int[Tensor, " latent"]:
    if sae.d_out != sae.d_in or sae.W_skip is not None or sae.metadata.site_out:
        raise InputError(
            "sae",
            expected="an autoencoder, whose latents write to the site they read",
            received="a transcoder",
            remedy="edit with an SAE of the site that is to be changed",
        )
    given = torch.as_tensor(latents).reshape(-1).cpu()
    if len(given) and (given.dtype == torch.bool or given.is_floating_point()):
        kind = str(given.dtype).removeprefix("torch.")
        raise InputError("latents", expected="whole numbers", received=kind, remedy="pass indices, not a mask")
    chosen = given.long()
    bad = chosen[(chosen < 0) | (chosen >= sae.d_sae)]
    if len(bad) or not len(chosen):
        raise InputError(
            "latents",
            expected=f"one or more of 0 to {sae.d_sae - 1}",
            received=bad.tolist() if len(bad) else "none",
            remedy="name latents of this SAE",
        )
    if len(set(chosen.tolist())) != len(chosen):
        raise InputError("latents", expected="each latent once", received=chosen.tolist(), remedy="drop the repeats")
    return chosen


def _check_direction(direction: Tensor) -> Tensor:
    if direction.ndim != 1 or not bool(torch.isfinite(direction).all()):
        raise InputError(
            "direction",
            expected="a finite vector",
            received=f"shape {tuple(direction.shape)}" if direction.ndim != 1 else "NaN or infinity",
            remedy="pass [d_model]",
        )
    return direction.detach().to(torch.promote_types(direction.dtype, torch.float32))


def _finite(argument: str, value: float) -> float:
    if not math.isfinite(value):
        raise InputError(argument, expected="a finite number", received=value, remedy="pass another")
    return value


def _name(latents: Tensor) -> str:
    names = ", ".join(map(str, latents[:4].tolist())) + (f" and {len(latents) - 4} more" if len(latents) > 4 else "")
    return f"latent{'s' if len(latents) > 1 else ''} {names}"


def _describe(description: str, scope: Scope) -> str:
    tokens = "" if scope.tokens == "all" else f" on {scope.tokens} tokens"
    return description + tokens + ("" if scope.skip_first else ", first position included")
