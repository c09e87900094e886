"""saetools: `measure_latents` itself, on blocks that are the stopwatch; it measures percentiles and norms besides."""

from __future__ import annotations

import time

from workers.encode.task import Task
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    import torch

    from saetools import Site, load_sae, measure_latents
    from saetools.activations import ActivationBlock

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[task.precision]
    site, places = Site(0), torch.zeros(len(task.acts), dtype=torch.long)
    block = ActivationBlock({site: task.acts}, places, places.to(torch.uint8), places, places)
    asked_last = 0.0

    def blocks():
        nonlocal asked_last
        for _ in turns.timed(task.items(), library="saetools"):
            yield block
            asked_last = time.perf_counter()

    statistics = measure_latents(load_sae(task.folder), blocks(), site, encode_dtype=dtype)
    seconds_at_end = time.perf_counter() - asked_last
    measured = {"mean": statistics.mean, "rate": statistics.rate, "max": statistics.max}
    turns.finish(seconds_at_end=round(seconds_at_end, 4), **task.errors(**measured))


if __name__ == "__main__":
    serve(work)
