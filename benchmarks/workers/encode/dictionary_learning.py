"""dictionary_learning: `AutoEncoderTopK.encode`, batch by batch, and statistics of the dense latents."""

from __future__ import annotations

from workers.encode.task import Task, measure_dense
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    sae = AutoEncoderTopK.from_pretrained(f"{task.folder}/ae.pt")
    measure_dense(task, turns, sae.encode, library="dictionary-learning")


if __name__ == "__main__":
    serve(work)
