"""What every library does: answer the same prompts, of one length, under the same edit of one layer; greedily.

The edit acts on every token, the first included. `direction`: a vector is added. `clamp`: latents of a TopK SAE are
set, x + (decode(f') - decode(f)). `plain`: nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Task:
    """Model, prompts and edit of a run; an item is a batch of answers."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings, self.edit = settings, settings["edit"]
        self.layer, self.n_new, self.n_items = settings["layer"], settings["n_new"], settings["n_items"]
        self.token_ids = torch.from_numpy(np.load(settings["prompts"]))[: settings["batch"]]
        """[row, pos]; no padding."""
        self.vector = torch.from_numpy(np.load(settings["vector"]))
        self.latents, self.values = torch.tensor(settings["latents"]), torch.tensor(settings["values"])

    def items(self) -> Iterator[int]:
        """As many numbers as there are items."""
        return iter(range(self.n_items))

    def model(self) -> Any:
        """The Hugging Face causal LM in float32."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.settings["model"])
        assert next(model.parameters()).dtype == torch.float32
        return in_memory(model.eval().requires_grad_(False))

    def tokenizer(self) -> Any:
        """Its tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.settings["model"])

    def options(self) -> dict[str, Any]:
        """Of Hugging Face's `generate`."""
        return {
            "attention_mask": torch.ones_like(self.token_ids),
            "do_sample": False,
            "min_new_tokens": self.n_new,
            "max_new_tokens": self.n_new,
        }

    def quality(self, token_ids: Tensor) -> dict[str, Any]:
        """How much of the answers is that of the bare hook, up to where one ends: the hook's `generate` may not end.

        Args:
            token_ids: [row, pos], prompts included; -1 after the end of an answer.
        """
        reference = torch.from_numpy(np.load(self.settings["reference"]))[: len(self.token_ids), -self.n_new :]
        answers = token_ids[:, -self.n_new :]
        ends = torch.tensor([-1, *self.settings["end_tokens"]])
        going = torch.isin(answers, ends).cumsum(1) == 0
        same = answers[going] == reference[going]
        return {"equal": bool(same.all()), "equal_tokens": float(same.float().mean()), "n_tokens": len(same)}


class Hook:
    """The edit as a bare forward hook of the layer, by its formula."""

    def __init__(self, task: Task) -> None:
        self.task = task
        if task.edit == "clamp":
            from safetensors.torch import load_file

            weights = load_file(f"{task.settings['sae']}/sae_weights.safetensors")
            self.w = {name: weight.float() for name, weight in weights.items()}
            self.w_enc = self.w["W_enc"].T.contiguous()
            self.rows = self.w["W_dec"][task.latents]

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        acts = output[0] if isinstance(output, tuple) else output
        if self.task.edit == "direction":
            new = acts + self.task.vector
        else:
            pre = torch.nn.functional.linear(acts - self.w["b_dec"], self.w_enc, self.w["b_enc"])
            least = pre.topk(self.task.settings["k"], dim=-1).values[..., -1:]
            own = pre[..., self.task.latents]
            f = torch.where(own >= least, own, 0.0).relu()
            new = acts + (self.task.values - f) @ self.rows
        return (new, *output[1:]) if isinstance(output, tuple) else new


def in_memory(model: nn.Module) -> nn.Module:
    """The model, its weights read from the file that they may only be mapped from."""
    for parameter in model.parameters():
        parameter.sum()
    return model
