"""One latent: an explanation of the passages shown, and verdicts on those held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from saetools.endpoint import AnswerError
from saetools.errors import InputError
from saetools.interpret.asking import Ask, ask_until_valid
from saetools.interpret.evidence import Evidence, strength
from saetools.interpret.explanation import Failure, balanced_accuracy
from saetools.interpret.marks import Marks, firing_tokens, free_marks, marked_text, wrong_tokens
from saetools.interpret.prompts import (
    detect_prompt,
    explain_prompt,
    fuzz_prompt,
    parse_explanation,
    parse_verdicts,
)
from saetools.latents.passage import Passage
from saetools.stats import Estimate

T = TypeVar("T")
Case = tuple[str, bool]
"""A text to judge, and what the verdict should be."""


@dataclass(frozen=True)
class ExplainConfig:
    """How much is shown and asked."""

    n_shown: int = 20
    """Passages that an explanation is made from: half the strongest, half spread over the others."""
    n_scored: int = 20
    """Held-out passages in which the latent fires, each of another document; and as many in which it does not."""
    n_per_request: int = 5
    """Passages judged in one request."""
    threshold: float = 0.5
    """Tokens above this share of a passage's largest activation are marked."""
    max_attempts: int = 3
    """How often to ask where the answer cannot be read."""
    max_tokens: int = 300
    """Longest answer; models that reason aloud need more."""
    seed: int = 0
    """Of all that is left to chance: what is held out, how it is ordered, where wrong marks lie."""

    def __post_init__(self) -> None:
        for name in ("n_shown", "n_scored", "n_per_request", "max_attempts", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(name, expected="1 or more", received=getattr(self, name), remedy="raise it")
        if not 0 <= self.threshold < 1:
            raise InputError(
                "threshold", expected="0 or more, below 1", received=self.threshold, remedy="0.5 marks peaks"
            )


@dataclass(frozen=True)
class Outcome:
    """What came of one latent; as in `Explanation`."""

    text: str | None
    detection: Estimate | None
    fuzzing: Estimate | None
    failures: tuple[Failure, ...]


def explain_evidence(
    latent: int, evidence: Evidence, ask: Ask, *, acts_of: str | None, config: ExplainConfig
) -> Outcome:
    """Explain what is shown of a latent, and score the explanation on what is held out.

    Args:
        latent: which; seeds what is left to chance.
        evidence: its passages, of which some must be shown.
        ask: whom.
        acts_of: name of the model whose activations count.
        config: how much is asked.

    Raises:
        BudgetSpentError: if the budget does not suffice.
    """
    marks = free_marks((*evidence.shown, *evidence.active))
    texts = [marked_text(one, firing_tokens(one, acts_of, threshold=config.threshold), marks) for one in evidence.shown]
    prompt = explain_prompt(texts, [strength(one, acts_of) for one in evidence.shown], marks)
    try:
        text = _ask(ask, prompt, parse_explanation, config)
    except AnswerError as error:
        return Outcome(None, None, None, (Failure("explain", len(texts), str(error)),))
    generator = torch.Generator().manual_seed(_seed(config.seed, latent))
    n_pairs = min(len(evidence.active), len(evidence.inactive))
    plain = [(one.text, True) for one in evidence.active[:n_pairs]]
    plain += [(one.text, False) for one in evidence.inactive[:n_pairs]]
    marked = _right_and_wrong_marks(evidence.active, acts_of, config.threshold, marks, generator)
    judge = partial(_judge, ask=ask, config=config, generator=generator)
    detection, undetected = judge("detection", plain, prompt=partial(detect_prompt, text))
    fuzzing, unfuzzed = judge("fuzzing", marked, prompt=partial(fuzz_prompt, text, marks=marks))
    return Outcome(text, detection, fuzzing, (*undetected, *unfuzzed))


def _right_and_wrong_marks(
    passages: Sequence[Passage], acts_of: str | None, threshold: float, marks: Marks, generator: torch.Generator
) -> list[Case]:
    """Half of the passages with marks where the latent fires, half with as many where it is silent.

    Passages without room for wrong marks are left out.
    """
    able = []
    for passage in passages:
        right = firing_tokens(passage, acts_of, threshold=threshold)
        wrong = wrong_tokens(passage, right, acts_of, generator=generator)
        if wrong is not None:
            able.append((passage, right, wrong))
    wrong_ones = set(torch.randperm(len(able), generator=generator)[: len(able) // 2].tolist())
    return [
        (marked_text(passage, wrong if place in wrong_ones else right, marks), place not in wrong_ones)
        for place, (passage, right, wrong) in enumerate(able)
    ]


def _judge(
    step: str,
    cases: Sequence[Case],
    *,
    prompt: Callable[[Sequence[str]], str],
    ask: Ask,
    config: ExplainConfig,
    generator: torch.Generator,
) -> tuple[Estimate | None, list[Failure]]:
    """Verdicts on cases in random order, some at a time: how many of them are right, and which are missing."""
    if {truth for _, truth in cases} != {True, False}:
        return None, [Failure(step, len(cases), "too few held-out passages")]
    right: dict[bool, list[bool]] = {True: [], False: []}
    failures = []
    order = torch.randperm(len(cases), generator=generator).tolist()
    for start in range(0, len(order), config.n_per_request):
        some = [cases[place] for place in order[start : start + config.n_per_request]]
        question = prompt([text for text, _ in some])
        try:
            verdicts = _ask(ask, question, partial(parse_verdicts, n=len(some)), config)
        except AnswerError as error:
            failures.append(Failure(step, len(some), str(error)))
            continue
        for (_, truth), verdict in zip(some, verdicts, strict=True):
            right[truth].append(verdict == truth)
    score = balanced_accuracy(right[True], right[False], seed=config.seed) if all(right.values()) else None
    return score, failures


def _ask(ask: Ask, prompt: str, parse: Callable[[str], T], config: ExplainConfig) -> T:
    return ask_until_valid(ask, prompt, parse, max_tokens=config.max_tokens, max_attempts=config.max_attempts)


def _seed(seed: int, latent: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{latent}".encode()).digest()[:7], "little")
