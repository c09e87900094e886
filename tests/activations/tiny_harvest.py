"""Conversations for tests, and a process that harvests them or trains on them, to be killed.

`python tiny_harvest.py OUT TOKENIZER MODEL SETTINGS` prints a line after every shard and then waits for a line. With
`stream` or `store` as settings it trains an SAE straight from the model, or on a store, and does so after every step.
With `together` as a fifth argument it is one of several processes, waits for nobody, and says which shards it writes.
"""

from __future__ import annotations

import json
import sys

import torch

from saetools.activations import Activations, HarvestConfig, StoredActivations, StreamedActivations, harvest
from saetools.data import Conversation, TokenizedConversation, tokenize
from saetools.models import LanguageModel, Site
from saetools.sae import Progress, TopKLoss, TrainConfig

WORDS = "the car that I saw there was thin and then the other one broke down on the thruway".split()  # noqa: SIM905
CONVERSATIONS = [
    Conversation.chat(" ".join(WORDS[: 2 + i % 7]) + "?", " ".join(WORDS[i % 5 :]), id=f"chat-{i}") for i in range(9)
]
CONVERSATIONS += [Conversation(text=" ".join(WORDS[:n]), id=f"text-{n}") for n in (1, 4, 9)]
CONVERSATIONS += [Conversation(text="z", id="one-token"), Conversation.chat("And?", system="Be brief.", id="prompt")]

SITES = [Site(0), Site(1, "mlp_out")]
TRAIN = TrainConfig(
    d_sae=40, loss=TopKLoss(k=3), n_tokens=40 * 16, batch_size=16, warmup_steps=5, checkpoint_every=3, log_every=1
)
"""40 steps, over more than one epoch."""


def source_of(
    kind: str, lm: LanguageModel, conversations: list[TokenizedConversation], out: str
) -> Activations[tuple[int, ...]]:
    """Activations straight from a model, or from a store beside the folder of a run; in several pools."""
    if kind == "stream":
        return StreamedActivations(lm, SITES, conversations, buffer_tokens=120)
    store = harvest(lm, SITES, conversations, f"{out}-store", config=HarvestConfig(shard_tokens=40))
    return StoredActivations(store, pool_shards=3)


if __name__ == "__main__":
    from transformers import AutoTokenizer

    from saetools.models import load_model
    from saetools.sae import train_sae

    torch.set_num_threads(1)
    out, tokenizer, model, settings, *together = sys.argv[1:]
    if together:
        torch.distributed.init_process_group("gloo")

    def report(done: int, total: int) -> None:
        print(done, flush=True)
        sys.stdin.readline()

    lm = load_model(model, tokenizer=AutoTokenizer.from_pretrained(tokenizer))
    conversations = list(tokenize(CONVERSATIONS, lm.tokenizer))
    if settings in ("stream", "store"):

        def told(progress: Progress) -> None:
            report(progress.step, progress.n_steps)

        train_sae(source_of(settings, lm, conversations, out).at(SITES[0]), TRAIN, out, on_progress=told)
    elif together:
        from saetools.activations import store

        rank, write = torch.distributed.get_rank(), store._write_shard
        store._write_shard = lambda *args: print(f"rank{rank} {args[-1]}", flush=True) or write(*args)
        harvest(lm, SITES, conversations, out, config=HarvestConfig(**json.loads(settings)))
        torch.distributed.destroy_process_group()
    else:
        harvest(lm, SITES, conversations, out, config=HarvestConfig(**json.loads(settings)), on_progress=report)
