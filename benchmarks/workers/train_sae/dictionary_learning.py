"""dictionary_learning: `TopKTrainer.update`, one call a step.

Its `trainSAE` uses autocast on GPUs only; in bfloat16 we put the same autocast around the call.
"""

from __future__ import annotations

from workers.train_sae.task import Task
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=task.n_steps,
        activation_dim=task.d_model,
        dict_size=task.d_sae,
        k=task.k,
        layer=0,
        lm_name="",
        lr=task.lr,
        warmup_steps=0,
        seed=0,
        device=task.device,
    )
    for step, x in enumerate(turns.timed(task.batches(), library="dictionary-learning")):
        with task.autocast():
            trainer.update(step, x)
    turns.finish(fvu=task.fvu(trainer.ae), n_dead=trainer.dead_features)


if __name__ == "__main__":
    serve(work)
