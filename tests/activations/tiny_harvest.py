"""Conversations for tests, and a process that harvests them, to be killed.

`python tiny_harvest.py OUT TOKENIZER MODEL SETTINGS` prints a line after every shard and then waits for a line.
"""

from __future__ import annotations

import json
import sys

import torch

from saetools.data import Conversation, tokenize

WORDS = "the car that I saw there was thin and then the other one broke down on the thruway".split()  # noqa: SIM905
CONVERSATIONS = [
    Conversation.chat(" ".join(WORDS[: 2 + i % 7]) + "?", " ".join(WORDS[i % 5 :]), id=f"chat-{i}") for i in range(9)
]
CONVERSATIONS += [Conversation(text=" ".join(WORDS[:n]), id=f"text-{n}") for n in (1, 4, 9)]
CONVERSATIONS += [Conversation(text="z", id="one-token"), Conversation.chat("And?", system="Be brief.", id="prompt")]


if __name__ == "__main__":
    from transformers import AutoTokenizer

    from saetools.activations import HarvestConfig, harvest
    from saetools.models import Site, load_model

    torch.set_num_threads(1)
    out, tokenizer, model, settings = sys.argv[1:]

    def report(done: int, total: int) -> None:
        print(done, flush=True)
        sys.stdin.readline()

    lm = load_model(model, tokenizer=AutoTokenizer.from_pretrained(tokenizer))
    conversations = list(tokenize(CONVERSATIONS, lm.tokenizer))
    sites = [Site(0), Site(1, "mlp_out")]
    harvest(lm, sites, conversations, out, config=HarvestConfig(**json.loads(settings)), on_progress=report)
