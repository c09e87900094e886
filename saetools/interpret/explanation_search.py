"""Explanations that fit a query: by their words, or by meaning with an encoder of the reader's choice.

By words (BM25) needs no model and finds what is said in the same words only. By meaning compares mean-pooled vectors of
a local encoder such as all-MiniLM-L6-v2, and finds what is said otherwise.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.errors import InputError
from saetools.interpret.explanation import Explanation

_WORD = re.compile(r"\w+")
_K1, _B = 1.2, 0.75  # BM25: how soon repeated words count less, and how much long texts are held back
_BATCH = 32
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")

Encoder = Callable[[Sequence[str]], Float[Tensor, "text d"]]
"""Unit vectors of texts."""


@dataclass(frozen=True)
class ExplanationHit:
    """An explanation that fits a query, and how well: a BM25 score, or a cosine."""

    explanation: Explanation
    score: float


def search_explanations(
    explanations: Sequence[Explanation], query: str, *, encoder: Encoder | None, n: int = 10
) -> list[ExplanationHit]:
    """The explanations that fit a query best.

    Args:
        explanations: of `explain_latents`; those without text are left out.
        query: what is sought, in words.
        encoder: of `load_text_encoder`, to search by meaning; `None` to search by words, which leaves out explanations
            that share none with the query.
        n: most explanations to list.

    Raises:
        InputError: for a query without words.

    Example:
        >>> made = [Explanation(j, text, "", None, None, 1, (), {}) for j, text in enumerate(["words of love", "war"])]
        >>> [hit.explanation.latent for hit in search_explanations(made, "War and peace", encoder=None)]
        [1]
    """
    if not _WORD.search(query):
        raise InputError("query", expected="words", received=repr(query), remedy="say what is sought")
    able = [one for one in explanations if one.text]
    texts = [one.text or "" for one in able]
    if not able:
        return []
    scores = bm25(texts, query) if encoder is None else (encoder(texts) @ encoder([query])[0]).tolist()
    order = sorted(range(len(able)), key=lambda place: -scores[place])
    if encoder is None:
        order = [place for place in order if scores[place] > 0]
    return [ExplanationHit(able[place], scores[place]) for place in order[:n]]


def bm25(texts: Sequence[str], query: str) -> list[float]:
    """How well each text fits the words of a query; 0 where it has none of them.

    Args:
        texts: what is searched; rare words among them count more.
        query: its words count once each.
    """
    counts = [Counter(_words(text)) for text in texts]
    lengths = [sum(count.values()) for count in counts]
    mean_length = max(1.0, sum(lengths) / max(1, len(texts)))
    scores = [0.0] * len(texts)
    for word in set(_words(query)):
        n_with = sum(word in count for count in counts)
        weight = math.log1p((len(texts) - n_with + 0.5) / (n_with + 0.5))
        for place, count in enumerate(counts):
            held_back = _K1 * (1 - _B + _B * lengths[place] / mean_length)
            scores[place] += weight * count[word] * (_K1 + 1) / (count[word] + held_back)
    return scores


def load_text_encoder(folder: str | Path, *, device: torch.device | str = "cpu") -> Encoder:
    """A sentence encoder from a Hugging Face or sentence-transformers folder on this machine.

    Vectors are means over tokens, unless the folder says that they are those of the first token. Prefixes that some
    encoders want before a query are the caller's to write.

    Args:
        folder: with config, weights and tokenizer; nothing is fetched, and no code in it is run.
        device: where it runs.

    Raises:
        InputError: if the folder holds no encoder, or one that pools in another way.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = Path(folder)
    by_first = _pools_by_first_token(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModel.from_pretrained(folder, local_files_only=True).to(device).eval()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            "folder",
            expected="a model and a tokenizer in Hugging Face format",
            received=f"{folder} ({str(error).splitlines()[0]})",
            remedy="download an encoder, such as all-MiniLM-L6-v2, and name its folder",
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Float[Tensor, "text d"]:
        found = []
        for start in range(0, len(texts), _BATCH):
            some = list(texts[start : start + _BATCH])
            batch = tokenizer(
                some, padding=True, padding_side="right", truncation=True, max_length=longest, return_tensors="pt"
            ).to(device)
            hidden = model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None]
            pooled = hidden[:, 0] if by_first else (hidden * mask).sum(1) / mask.sum(1)
            found.append(torch.nn.functional.normalize(pooled, dim=1).cpu())
        return torch.cat(found)

    return encode


def _pools_by_first_token(folder: Path) -> bool:
    """What a sentence-transformers folder says of pooling; a plain folder says nothing, and means are taken.

    Raises:
        InputError: if it wants what is not done here.
    """
    if not (folder / "modules.json").is_file():
        return False
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    other = [one["type"] for one in modules if one["type"].rpartition(".")[2] not in _KNOWN_MODULES]
    modes = []
    for one in modules:
        if one["type"].endswith("Pooling"):
            settings = json.loads((folder / one["path"] / "config.json").read_text(encoding="utf-8"))
            modes = [name for name, value in settings.items() if name.startswith("pooling_mode") and value is True]
    if other or modes not in (["pooling_mode_mean_tokens"], ["pooling_mode_cls_token"]):
        raise InputError(
            "folder",
            expected="an encoder that pools by the mean or the first token, and does nothing further",
            received=", ".join(other + modes) or "no pooling",
            remedy="use another encoder, or wrap this one in a function from texts to unit vectors",
        )
    return modes == ["pooling_mode_cls_token"]


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]
