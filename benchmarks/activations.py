"""Real tokens and activations to measure with: shipped texts, and what the built-in model makes of them."""

from __future__ import annotations

import math
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from saetools import Conversation
    from saetools.data import TokenizedConversation

MODEL, SITE = "smollm2-135m", "blocks.17.hook_resid_post"
CACHE = Path(__file__).resolve().parent / ".cache"


def harvested(n_tokens: int) -> Path:
    """A float32 .npy of [n_tokens, d_model], shuffled, first positions left out; harvested once, then kept.

    The mean norm is brought to sqrt(d_model), so that one learning rate means the same to every library.
    """
    path = CACHE / f"{MODEL}.{SITE}.{n_tokens}.npy"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        _harvest(path, n_tokens)
    return path


def stored(n_contexts: int, length: int) -> Path:
    """A store of packed contexts in bfloat16, first positions left out; harvested once, then kept."""
    from saetools import HarvestConfig, Site, harvest, load_model

    path = CACHE / f"{MODEL}.{SITE}.{n_contexts}x{length}"
    contexts = as_conversations(packed(n_contexts, length))
    harvest(load_model(MODEL), [Site.parse(SITE)], contexts, path, config=HarvestConfig(shard_tokens=8192))
    return path


def as_conversations(contexts: np.ndarray) -> list[TokenizedConversation]:
    """Contexts of equal length in the form that saetools reads."""
    import torch

    from saetools.data import Role, TokenizedConversation

    roles = torch.full(contexts.shape[1:], int(Role.PROMPT), dtype=torch.uint8)
    return [TokenizedConversation(torch.from_numpy(row), roles, str(i)) for i, row in enumerate(contexts)]


def packed(n_contexts: int, length: int) -> np.ndarray:
    """Token ids of the shipped texts one after the other, cut into contexts of one length; int64 [context, pos]."""
    import numpy as np
    from transformers import AutoTokenizer

    from saetools import tokenize
    from saetools.models.builtin import fetch_builtin

    tokenizer = AutoTokenizer.from_pretrained(fetch_builtin(MODEL))
    ids = np.concatenate([one.token_ids.numpy() for one in tokenize(shipped_texts(), tokenizer)])
    if len(ids) < n_contexts * length:
        raise SystemExit(f"benchmarks: the shipped texts have {len(ids)} tokens, {n_contexts * length} are needed")
    return ids[: n_contexts * length].reshape(n_contexts, length)


def shipped_texts() -> list[Conversation]:
    """All questions with good answers and all voices, shuffled."""
    from saetools import Conversation, load_advice, load_voices

    texts = [Conversation.chat(item.question, item.correct) for item in load_advice()]
    texts += [Conversation(text=text) for pair in load_voices() for text in (pair.voiced, pair.neutral)]
    random.Random(0).shuffle(texts)
    return texts


def _harvest(path: Path, n_tokens: int) -> None:
    import numpy as np

    from saetools import HarvestConfig, Site, harvest, load_model, tokenize

    site, lm = Site.parse(SITE), load_model(MODEL)
    chosen, n_chosen = [], 0
    for conversation in tokenize(shipped_texts(), lm.tokenizer):
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
