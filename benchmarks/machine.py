"""What a measurement was taken on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil

N_CORES = os.cpu_count() or 1


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, memory and how busy the machine is now; the GPU, where that is measured."""
    return {
        **(_describe_gpu() if device == "cuda" else {}),
        "cpu": _first("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": N_CORES,
        "bf16_instructions": bool({"avx512_bf16", "amx_bf16", "bf16"} & set(_first("/proc/cpuinfo", "flags").split())),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _describe_gpu() -> dict[str, Any]:
    import torch

    return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "torch": torch.__version__}


def busy_seconds() -> float:
    """CPU time that all processes together have used since the machine started."""
    times = psutil.cpu_times()
    return sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))


def _first(file: str, field: str) -> str:
    """The first value of a field in a file of `field : value` lines; empty where there is none."""
    path = Path(file)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
