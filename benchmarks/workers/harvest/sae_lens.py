"""SAELens: its `ActivationsStore` on the Hugging Face model, which stops after the layer; nothing is mixed."""

from __future__ import annotations

from workers.harvest.task import Task
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    import torch
    from datasets import Dataset
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activations_store import ActivationsStore

    hook = f"model.layers.{task.layer}"
    model = HookedProxyLM(task.model(), None, hook_names=[hook])
    contexts = torch.cat(list(task.items())).tolist()
    n_contexts, length = task.tokens.shape[1:]
    store = ActivationsStore(
        model=model,
        dataset=Dataset.from_dict({"tokens": contexts}),
        streaming=False,
        hook_name=hook,
        hook_head_index=None,
        context_size=length,
        d_in=model.model.config.hidden_size,
        n_batches_in_buffer=n_contexts,
        total_training_tokens=1,
        store_batch_size_prompts=n_contexts,
        train_batch_size_tokens=n_contexts * length,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        autocast_lm=task.settings["precision"] == "autocast",
        activations_mixing_fraction=0.0,
    )
    for batch in turns.timed(store, library="sae-lens"):
        acts = batch
    turns.finish(**task.quality(acts))


if __name__ == "__main__":
    serve(work)
