"""Arguments of edits: checked, and written so that they can be read again."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.errors import InputError
from saetools.sae.model import SAE

MODIFIERS = ("if", "on", "from", "with", "without", "when", "unless", "over")
"""Words of the language of edits that follow a change."""
_NAME = re.compile(r"[^\W\d][\w.-]*")

Latents = int | Sequence[int] | Int[Tensor, " latent"]
Unit = Literal["activation", "p99", "norm"]


def check_latents(sae: SAE, latents: Latents) -> Int[Tensor, " latent"]:
    """Latents of an SAE that writes to the site that it reads.

    Raises:
        InputError: for a transcoder, none, one that does not exist, or one that is named twice.
    """
    if sae.d_out != sae.d_in or sae.W_skip is not None or sae.metadata.site_out:
        raise InputError(
            "sae",
            expected="an autoencoder, whose latents write to the site they read",
            received="a transcoder",
            remedy="edit with an SAE of the site that is to be changed",
        )
    try:
        given = torch.as_tensor(latents).reshape(-1).cpu()
    except (RuntimeError, OverflowError, ValueError) as error:  # a number that no tensor holds
        raise InputError(
            "latents", expected=f"0 to {sae.d_sae - 1}", received="a larger number", remedy="name latents of this SAE"
        ) from error
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


def check_direction(
    direction: Tensor, *, nonzero: bool = False, argument: str = "direction"
) -> Float[Tensor, " d_model"]:
    """A finite vector, in float32 or better, on the CPU.

    Raises:
        InputError: for another shape, NaN, infinity, or zero where a direction is needed.
    """
    if direction.ndim != 1 or not bool(torch.isfinite(direction).all()):
        raise InputError(
            argument,
            expected="a finite vector",
            received=f"shape {tuple(direction.shape)}" if direction.ndim != 1 else "NaN or infinity",
            remedy="pass [d_model]",
        )
    if nonzero and not bool(direction.any()):
        raise InputError(argument, expected="a direction", received="a zero vector", remedy="pass another")
    return direction.detach().to("cpu", torch.promote_types(direction.dtype, torch.float32))


def check_name(name: str) -> str:
    """How a direction is called in a printed edit; empty for no name.

    Raises:
        InputError: for a name that could not be read again.
    """
    if name and (not _NAME.fullmatch(name) or name in (*MODIFIERS, "active")):
        raise InputError(
            "name",
            expected="a letter, then letters, digits, _ - and ., and no word of the language of edits",
            received=repr(name),
            remedy="call it otherwise",
        )
    return name


def finite(argument: str, value: float) -> float:
    """A finite number.

    Raises:
        InputError: for NaN or infinity.
    """
    if not math.isfinite(value):
        raise InputError(argument, expected="a finite number", received=value, remedy="pass another")
    return float(value)


def per_latent(argument: str, value: float | Sequence[float], n: int) -> list[float]:
    """A number for each latent.

    Raises:
        InputError: for numbers that are not finite, or another number of them.
    """
    values = torch.as_tensor(value, dtype=torch.double).reshape(-1).tolist()
    if (not isinstance(value, float | int) and len(values) != n) or not all(map(math.isfinite, values)):
        raise InputError(
            argument,
            expected="finite numbers, one for all latents or one for each",
            received=value,
            remedy=f"give one, or {n}",
        )
    return values * n if isinstance(value, float | int) else values


def units(argument: str, sae: SAE, latents: Int[Tensor, " latent"], unit: Unit) -> Float[Tensor, " latent"]:
    """How many units of activation a unit of each latent is.

    Raises:
        InputError: for another unit, or an SAE whose statistics do not hold it.
    """
    if unit == "activation":
        return torch.ones(len(latents), dtype=torch.double)
    if unit == "p99":
        if sae.p99 is None:
            raise InputError(
                argument,
                expected="activation, for an SAE without latent statistics",
                received="'p99'",
                remedy="measure them: saetools.measure_latents",
            )
        return sae.p99.cpu()[latents].double()
    if unit == "norm":
        if sae.input_norm != "none":
            raise InputError(
                argument,
                expected="activation or p99, for an SAE that normalises its input: how much a latent writes varies",
                received="'norm'",
                remedy="pass another unit",
            )
        rows = sae.W_dec.detach()[latents.to(sae.W_dec.device)].double().cpu()
        norms = torch.linalg.vector_norm(rows, dim=1)
        if bool((norms == 0).any()):
            zero = latents[norms == 0].tolist()
            raise InputError(
                "latents", expected="latents that write something", received=f"{zero}", remedy="leave them out"
            )
        of_a_norm: Tensor = median_norm(sae) / norms
        return of_a_norm
    raise InputError(argument, expected="activation, p99 or norm", received=repr(unit), remedy="pick one of these")


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


def written(value: float) -> str:
    """A number in the fewest digits that say all of it."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def written_latents(
    latents: Int[Tensor, " latent"], values: Sequence[float] | None = None, unit: Unit = "activation"
) -> str:
    """Latents with their values: `3,5=0.5*p99`, `3=1 5=2`."""
    names = [str(latent) for latent in latents.tolist()]
    if values is None:
        return ",".join(names)
    suffix = "" if unit == "activation" else f"*{unit}"
    if len(set(values)) == 1:
        return f"{','.join(names)}={written(values[0])}{suffix}"
    return " ".join(f"{name}={written(value)}{suffix}" for name, value in zip(names, values, strict=True))
