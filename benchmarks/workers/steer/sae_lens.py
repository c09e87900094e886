"""SAELens: latents clamped by a hook on the SAE that is spliced into its bridge, with the error term."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workers.steer.task import Task
from workers.turns import Turns, serve


def work(turns: Turns) -> None:
    task = Task(turns.settings)
    from sae_lens import SAE
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    model: Any = SAETransformerBridge.boot_transformers("x/llama", hf_model=task.model(), tokenizer=task.tokenizer())
    if task.edit == "clamp":
        sae = SAE.load_from_disk(task.settings["sae"], device="cpu", dtype="float32")
        sae.use_error_term = True
        name = f"blocks.{task.layer}.hook_out"
        sae.cfg.metadata.hook_name = name
        model.add_sae(sae)

        def clamp(acts: Tensor, hook: Any) -> Tensor:
            acts[..., task.latents] = task.values
            return acts

        hooks = [(f"{name}.hook_sae_acts_post", clamp)]
    else:
        hooks = [(f"blocks.{task.layer}.hook_out", lambda acts, hook: acts + task.vector)]
    with torch.inference_mode(), model.hooks(fwd_hooks=hooks):
        for _ in turns.timed(task.items(), library="sae-lens"):
            out = model.generate(
                task.token_ids,
                max_new_tokens=task.n_new,
                do_sample=False,
                stop_at_eos=False,
                return_type="tokens",
                verbose=False,
            )
    turns.finish(**task.quality(out))


if __name__ == "__main__":
    serve(work)
