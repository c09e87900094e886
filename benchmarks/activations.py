"""Real activations to measure with: shipped texts, read by the built-in model, in one memory-mapped file."""

from __future__ import annotations

import math
import random
import tempfile
from pathlib import Path

MODEL, SITE = "smollm2-135m", "blocks.17.hook_resid_post"
_CACHE = Path(__file__).resolve().parent / ".cache"


def harvested(n_tokens: int) -> Path:
    """A float32 .npy of [n_tokens, d_model], shuffled, first positions left out; harvested once, then kept.

    The mean norm is brought to sqrt(d_model), so that one learning rate means the same to every library.
    """
    path = _CACHE / f"{MODEL}.{SITE}.{n_tokens}.npy"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        _harvest(path, n_tokens)
    return path


def _harvest(path: Path, n_tokens: int) -> None:
    import numpy as np

    from saetools import Conversation, HarvestConfig, Site, harvest, load_advice, load_model, load_voices, tokenize

    site, lm = Site.parse(SITE), load_model(MODEL)
    texts = [Conversation.chat(item.question, item.correct) for item in load_advice()]
    texts += [Conversation(text=text) for pair in load_voices() for text in (pair.voiced, pair.neutral)]
    random.Random(0).shuffle(texts)
    chosen, n_chosen = [], 0
    for conversation in tokenize(texts, lm.tokenizer):
        chosen.append(conversation)
        n_chosen += len(conversation) - 1
        if n_chosen >= n_tokens:
            break
    else:
        raise SystemExit(
            f"benchmarks: the shipped texts have {n_chosen} tokens, {n_tokens} are needed; pass --activations"
        )
    with tempfile.TemporaryDirectory() as folder:
        store = harvest(lm, [site], chosen, folder, config=HarvestConfig(dtype="float32"))
        acts = store.at(site).sample(n_tokens, seed=0)
    acts *= math.sqrt(acts.shape[1]) / acts.norm(dim=1).mean()
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, acts.numpy())
    temporary.replace(path)
