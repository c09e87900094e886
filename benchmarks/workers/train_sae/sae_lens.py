"""SAELens: `SAETrainer.fit` on a `TopKTrainingSAE`; its data provider is the stopwatch."""

from __future__ import annotations

from workers.train_sae.task import Task
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    import torch
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(task.seed)
    # Sparse activations do not work on CPUs together with `rescale_acts_by_decoder_norm`. Decoder rows start at length
    # 1 and b_dec at the mean, as elsewhere; its defaults are 0.1 and 0.
    sparse = turns.settings.get("sparse", False)
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=task.d_model,
            d_sae=task.d_sae,
            device=task.device,
            k=task.k,
            decoder_init_norm=1.0,
            use_sparse_activations=sparse,
            rescale_acts_by_decoder_norm=not sparse,
        )
    )
    sae.b_dec.data.copy_(task.train.mean(0))
    if turns.settings.get("compiled"):
        # What its runner does for `compile_sae=True`.
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)
    config = SAETrainerConfig(
        total_training_samples=task.n_steps * task.batch,
        train_batch_size_samples=task.batch,
        lr=task.lr,
        lr_end=task.lr,
        autocast=task.bf16,
        device=task.device,
    )
    trainer = SAETrainer(config, sae, turns.timed(task.batches(), library="sae-lens"))
    trainer.fit()
    turns.finish(fvu=task.fvu(sae), n_dead=int(trainer.dead_neurons.sum()))


if __name__ == "__main__":
    serve(work)
