"""Edits of latents: x + (decode(f') - decode(f)), so that what the SAE does not explain stays."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from saetools.sae.model import SAE
from saetools.steer.changes import LatentMap, Push
from saetools.steer.edits import Part, SteeringEdit
from saetools.steer.numbers import Latents, Unit, check_latents, median_norm, per_latent, units, written_latents


def add(
    sae: SAE,
    latents: Latents,
    strength: float | Sequence[float],
    *,
    unit: Unit = "norm",
    only_if_active: bool = False,
) -> SteeringEdit:
    """Push x along the decoder rows of latents, whatever their activations are (arXiv 2506.19823).

    Args:
        sae: the SAE.
        latents: one or several.
        strength: for all of them or for each; usually within [-0.5, 0.5] in norms.
        unit: `norm`: x + s m d_j, m the median residual norm at the SAE's site and d_j the unit decoder row;
            `activation`: f'_j = f_j + s; `p99`: the same in multiples of each latent's 99th percentile where active.
        only_if_active: leave a latent alone on tokens where it is inactive.

    Raises:
        InputError: for a latent that does not exist, strengths that are not finite, or statistics the SAE lacks.

    Example:
        >>> sae = load_sae(shipped_path("sae/smollm2-135m"))
        >>> add(sae, 3, 0.25), add(sae, [3, 5], 2.0, unit="activation").on("response")
        (add 3=0.25*norm, add 3,5=2 on response)
    """
    chosen = check_latents(sae, latents)
    strengths = per_latent("strength", strength, len(chosen))
    text = "add " + written_latents(chosen, strengths, unit) + (" if active" if only_if_active else "")
    if unit == "norm" and sae.input_norm != "none" and not only_if_active:  # what f + s writes depends on the token
        rows = sae.W_dec.detach()[chosen.to(sae.W_dec.device)].float().cpu()
        steps = torch.tensor(strengths) * median_norm(sae)
        return SteeringEdit([Part(Push(text, steps @ torch.nn.functional.normalize(rows, dim=1)))])
    shift = torch.tensor(strengths, dtype=torch.double) * units("unit", sae, chosen, unit)
    return _mapped(text, sae, chosen, shift=shift, only_if_active=only_if_active)


def clamp(
    sae: SAE,
    latents: Latents,
    value: float | Sequence[float],
    *,
    unit: Unit = "activation",
    only_if_active: bool = False,
) -> SteeringEdit:
    """Set latents to a value on every token: f'_j = c, also where they are inactive or outside the top k.

    Args:
        sae: the SAE.
        latents: one or several.
        value: the activation to set, for all or for each of them.
        unit: `activation`: in units of the unscaled residual stream; `p99`: in multiples of each latent's 99th
            percentile where it is active, on the SAE's reference corpus; `norm`: so that the latent writes c median
            residual norms.
        only_if_active: leave a latent alone on tokens where it is inactive.

    Raises:
        InputError: for a latent that does not exist, values that are not finite or do not fit the number of latents,
            or statistics the SAE lacks.

    Example:
        >>> sae = load_sae(shipped_path("sae/smollm2-135m"))
        >>> clamp(sae, [3, 5], 0.0), clamp(sae, 3, -0.5, unit="p99", only_if_active=True)
        (clamp 3,5=0, clamp 3=-0.5*p99 if active)
    """
    return _bounded("clamp", sae, latents, value, unit, only_if_active, low=True, high=True)


def clamp_min(
    sae: SAE,
    latents: Latents,
    value: float | Sequence[float],
    *,
    unit: Unit = "activation",
    only_if_active: bool = False,
) -> SteeringEdit:
    """Raise latents to a least value: f'_j = max(f_j, c). Arguments and errors as of `clamp`."""
    return _bounded("clamp_min", sae, latents, value, unit, only_if_active, low=True, high=False)


def clamp_max(
    sae: SAE,
    latents: Latents,
    value: float | Sequence[float],
    *,
    unit: Unit = "activation",
    only_if_active: bool = False,
) -> SteeringEdit:
    """Lower latents to a largest value: f'_j = min(f_j, c). Arguments and errors as of `clamp`."""
    return _bounded("clamp_max", sae, latents, value, unit, only_if_active, low=False, high=True)


def scale(sae: SAE, latents: Latents, factor: float | Sequence[float]) -> SteeringEdit:
    """Multiply the activations of latents: f'_j = a f_j; 1 changes nothing, 0 is `ablate`.

    Raises:
        InputError: for a latent that does not exist, or factors that are not finite.

    Example:
        >>> sae = load_sae(shipped_path("sae/smollm2-135m"))
        >>> scale(sae, 3, 2.0)
        scale 3=2
    """
    chosen = check_latents(sae, latents)
    factors = per_latent("factor", factor, len(chosen))
    text = "scale " + written_latents(chosen, factors)
    return _mapped(text, sae, chosen, factor=torch.tensor(factors, dtype=torch.double))


def ablate(sae: SAE, latents: Latents) -> SteeringEdit:
    """Set latents to 0 wherever they are active.

    Raises:
        InputError: for a latent that does not exist.

    Example:
        >>> sae = load_sae(shipped_path("sae/smollm2-135m"))
        >>> ablate(sae, [3, 5]).on("response")
        ablate 3,5 on response
    """
    chosen = check_latents(sae, latents)
    zeros = torch.zeros(len(chosen), dtype=torch.double)
    return _mapped("ablate " + written_latents(chosen), sae, chosen, low=zeros, high=zeros)


def _bounded(
    name: str,
    sae: SAE,
    latents: Latents,
    value: float | Sequence[float],
    unit: Unit,
    only_if_active: bool,
    *,
    low: bool,
    high: bool,
) -> SteeringEdit:
    chosen = check_latents(sae, latents)
    values = per_latent("value", value, len(chosen))
    bound = torch.tensor(values, dtype=torch.double) * units("unit", sae, chosen, unit)
    text = f"{name} {written_latents(chosen, values, unit)}" + (" if active" if only_if_active else "")
    bounds = {"low": bound} if low else {}
    bounds |= {"high": bound} if high else {}
    return _mapped(text, sae, chosen, only_if_active=only_if_active, **bounds)


def _mapped(
    text: str,
    sae: SAE,
    latents: Tensor,
    *,
    factor: Tensor | None = None,
    shift: Tensor | None = None,
    low: Tensor | None = None,
    high: Tensor | None = None,
    only_if_active: bool = False,
) -> SteeringEdit:
    """The edit of latents with these numbers."""
    unchanged = ((factor, 1.0), (shift, 0.0), (low, -math.inf), (high, math.inf))
    numbers = torch.stack(
        [
            torch.full(latents.shape, default, dtype=torch.double) if given is None else given
            for given, default in unchanged
        ]
    )
    return SteeringEdit([Part(LatentMap(text, sae, latents, numbers, only_if_active))])
