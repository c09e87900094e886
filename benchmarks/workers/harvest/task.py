"""What every library reads: the residual stream after one layer, of the same contexts, all of one length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.float32}
"""Their dtype, by precision; `autocast` runs products in bfloat16."""


class Task:
    """Model, tokens and layer of a run; an item is a batch of contexts.

    Nobody pads, keeps keys and values, or runs the layers after the one that is read.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.layer, self.n_items = settings["layer"], settings["n_items"]
        self.tokens = torch.from_numpy(np.load(settings["tokens"]))
        """[batch, context, pos]; gone through again and again."""

    def items(self) -> Iterator[Tensor]:
        """Token ids [context, pos], batch by batch."""
        return islice(cycle(self.tokens), self.n_items)

    def model(self) -> nn.Module:
        """The Hugging Face causal LM."""
        return load(self.settings["model"], self.settings["precision"])

    def quality(self, acts: Tensor) -> dict[str, float]:
        """How far the activations of the last item are from those of the bare model in float32.

        Also what that does to the shipped SAE: the share of each token's top k latents that stay, and FVU. First
        positions, whose norms are a hundred times larger, do not count.

        Args:
            acts: [context * pos, d_model], or without first positions.
        """
        n_contexts, length = self.tokens.shape[1:]
        reference = np.load(self.settings["reference"], mmap_mode="r")[(self.n_items - 1) % len(self.tokens)]
        true, read = torch.from_numpy(reference.copy()), acts.float().reshape(n_contexts, -1, acts.shape[-1])
        true, read = true[:, 1:].flatten(0, 1), read[:, read.shape[1] - length + 1 :].flatten(0, 1)
        judge = Judge(self.settings["sae"], self.settings["k"])
        (true_top, true_fvu), (top, fvu) = judge.encode(true), judge.encode(read)
        return {
            "relative_error": float((read - true).norm() / true.norm()),
            "same_top_latents": float((top & true_top).sum() / true_top.sum()),
            "fvu": fvu,
            "fvu_change": fvu - true_fvu,
        }


class Judge:
    """A TopK SAE by its dense formula, in the field's common file format; needs none of the libraries."""

    def __init__(self, folder: str, k: int) -> None:
        from safetensors.torch import load_file

        weights = load_file(f"{folder}/sae_weights.safetensors")
        self.weights, self.k = {name: weight.float() for name, weight in weights.items()}, k

    def encode(self, acts: Tensor) -> tuple[Tensor, float]:
        """Which latents are active, [token, d_sae], and the fraction of variance that they leave unexplained."""
        w = self.weights
        top = ((acts - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).topk(self.k, dim=1)
        latents = torch.zeros(len(acts), len(w["b_enc"])).scatter_(1, top.indices, top.values.relu())
        error, variance = acts - latents @ w["W_dec"] - w["b_dec"], acts - acts.mean(0)
        return latents > 0, float(error.square().sum() / variance.square().sum())


def load(folder: str, precision: str) -> nn.Module:
    """The causal LM, ready to be run."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=WEIGHTS[precision])
    return in_memory(model.eval().requires_grad_(False))


def in_memory(model: nn.Module) -> nn.Module:
    """The model, its weights read from the file that they may only be mapped from."""
    for parameter in model.parameters():
        parameter.sum()
    return model


def autocast(precision: str) -> torch.autocast:
    """Products in bfloat16, where that is what is measured."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast")
