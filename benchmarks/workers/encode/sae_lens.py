"""SAELens: `TopKSAE.encode`, batch by batch, and statistics of the dense latents."""

from __future__ import annotations

from workers.encode.task import Task, measure_dense
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    from sae_lens import SAE

    sae = SAE.load_from_disk(task.folder)
    measure_dense(task, turns, sae.encode, library="sae-lens")


if __name__ == "__main__":
    serve(work)
