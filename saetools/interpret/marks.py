"""Passages as text, with some of their tokens between marks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, count, groupby

import torch

from saetools.interpret.evidence import firing
from saetools.latents.passage import Passage

Marks = tuple[str, str]


def free_marks(passages: Iterable[Passage]) -> Marks:
    """A pair of marks that occurs in none of the passages: `<<` and `>>`, if code does not use them.

    Example:
        >>> free_marks([])
        ('<<', '>>')
    """
    texts = [passage.text for passage in passages]
    numbered = ((f"<{number}<", f">{number}>") for number in count(1))
    pairs = chain([("<<", ">>"), ("[[", "]]")], numbered)  # texts end, so one of them is free
    return next(pair for pair in pairs if not any(mark in text for text in texts for mark in pair))


def marked_text(passage: Passage, marked: Sequence[bool], marks: Marks) -> str:
    """A passage with every run of marked tokens between marks."""
    parts = []
    for is_marked, tokens in groupby(zip(marked, passage.tokens, strict=True), key=lambda pair: pair[0]):
        text = "".join(token for _, token in tokens)
        parts.append(f"{marks[0]}{text}{marks[1]}" if is_marked else text)
    return "".join(parts)


def firing_tokens(passage: Passage, acts_of: str | None, *, threshold: float) -> list[bool]:
    """Tokens above a share of the passage's largest activation."""
    acts = firing(passage, acts_of)
    return [act > threshold * max(acts) and act > 0 for act in acts]


def wrong_tokens(
    passage: Passage, marked: Sequence[bool], acts_of: str | None, *, generator: torch.Generator
) -> list[bool] | None:
    """As many runs of tokens, each as long as before, but all where the latent is silent.

    Number and length of the marks then tell nothing of whether they are right.

    Returns:
        Which tokens to mark; `None` if there is no room for them.
    """
    lengths = [len(list(run)) for is_marked, run in groupby(marked) if is_marked]
    silent = [act == 0 for act in firing(passage, acts_of)]
    wrong = [False] * len(silent)
    for length in sorted(lengths, reverse=True):
        starts = [
            start
            for start in range(len(silent) - length + 1)
            # A neighbour that is marked already would make one run of two.
            if all(silent[start : start + length]) and not any(wrong[max(0, start - 1) : start + length + 1])
        ]
        if not starts:
            return None
        start = starts[int(torch.randint(len(starts), (), generator=generator))]
        wrong[start : start + length] = [True] * length
    return wrong
