"""SAEs on disk: which format a folder holds, read and written."""

from __future__ import annotations

from pathlib import Path

import torch

from saetools.errors import InputError
from saetools.sae.formats import sae_lens
from saetools.sae.model import SAE


def save_sae(sae: SAE, path: str | Path, *, storage_dtype: torch.dtype | None = None) -> Path:
    """Write an SAE so that `load_sae` and `sae_lens.SAE.load_from_disk` read it.

    The 99th percentiles of the latents, which SAELens does not know, lie in a file beside.

    Args:
        sae: what to write.
        path: folder; made if missing. The config is written last, so a folder with a config is complete.
        storage_dtype: dtype of the weights on disk, such as `float16` to halve the size; both readers cast back to the
            SAE's dtype.

    Returns:
        The folder.

    Raises:
        InputError: for a kind of SAE that SAELens does not have.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    sae_lens.save(sae, path, storage_dtype)
    return path


def load_sae(path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> SAE:
    """Read an SAE in SAELens' folder format.

    Configs from before SAELens 6 are understood as SAELens 6 understands them.

    Args:
        path: the folder with `cfg.json` and `sae_weights.safetensors`.
        dtype: of the weights in memory.
        device: of the weights.

    Raises:
        InputError: if there is no such folder, or for an architecture or a normalisation that is not supported.
        IntegrityError: if a file is damaged, shapes do not fit, or the weights are not those the config was written
            with.

    Example:
        >>> sae = load_sae("data/sae/smollm2-135m")
        >>> sae(torch.zeros(1, 576)).shape
        torch.Size([1, 576])
    """
    path = Path(path).expanduser()
    if not sae_lens.is_sae_lens(path):
        raise InputError(
            "path",
            expected=f"a folder with {sae_lens.CONFIG} and {sae_lens.WEIGHTS}",
            received=str(path),
            remedy="point at a folder that saetools or SAELens saved",
        )
    sae = sae_lens.load(path)
    p99 = sae.p99
    sae = sae.to(device, dtype)
    sae.p99 = None if p99 is None else p99.to(device)  # a statistic keeps its precision
    return sae.eval().requires_grad_(False)
