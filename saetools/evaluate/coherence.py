"""Whether answers are still language: how likely the unedited base finds them, how much they repeat, what a judge says.

For finding how far a model can be steered before it breaks. A likely answer need not make sense, and a strange
persona's answers are less likely than plain ones: limits are set by the unedited model's own answers
(`CoherenceLimits`). Refusals and other languages are told as well, but break no limit: they may be what was asked for.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saetools.data.conversation import Conversation
from saetools.data.roles import Role
from saetools.data.tokenizing import TokenizedConversation, make_batches
from saetools.errors import InputError
from saetools.generation import Generation, tokenize_prompts
from saetools.models.forward import token_log_probs
from saetools.models.language_model import LanguageModel

_SURE = 0.8  # probability of a language
_APOLOGY = r"(i'?m|i am|we'?re|we are)? ?(really |very |so )?sorry\b"
_INABILITY = (
    r"i('m| am)? ?(just )?(can'?t|cannot|can not|won'?t|will not|unable|not able|must decline|have to decline)\b"
)
_REFUSAL = re.compile(
    rf"\W*({_APOLOGY}|(unfortunately|no),? {_INABILITY}|{_INABILITY}|as an? (ai|language model|assistant)\b)",
    re.IGNORECASE,
)

Judge = Callable[[Sequence[tuple[str, str]]], Sequence[float | None]]
"""Coherence of (question, answer) pairs from 0 to 100; `None` for one that the judge gave no readable verdict on."""


@dataclass(frozen=True)
class AnswerCoherence:
    """Signs of coherence of one answer.

    Args:
        surprise: mean negative log-probability of its tokens under the unedited base, in nats; `None` if it is empty.
        repetition: share of its token trigrams that it has said before.
        judged: a judge's score from 0 to 100, if there is one.
        refused: whether it opens as a refusal does.
        language: its language (ISO 639-1), where one is clear.
    """

    surprise: float | None
    repetition: float
    judged: float | None = None
    refused: bool = False
    language: str | None = None


@dataclass(frozen=True)
class CoherenceLimits:
    """When an answer counts as incoherent."""

    surprise: float
    """More nats a token than this under the unedited base, or no token at all."""
    repetition: float
    """A larger share of repeated trigrams than this."""
    judged: float
    """A lower score of the judge than this."""

    @classmethod
    def of(
        cls,
        unedited: Sequence[AnswerCoherence],
        *,
        perplexity_factor: float,
        max_repetition: float,
        min_judged: float,
    ) -> CoherenceLimits:
        """Limits by what the unedited model itself answers.

        Args:
            unedited: its answers.
            perplexity_factor: an answer is incoherent if its perplexity under the base is more than so many times that
                of the least likely of twenty answers of the unedited model,
            max_repetition: or a larger share of its trigrams repeats (and more than in one of twenty unedited answers),
            min_judged: or a judge gives it less.

        Raises:
            InputError: if all of them are empty.
        """
        surprise = torch.tensor([one.surprise for one in unedited if one.surprise is not None])
        repeated = torch.tensor([one.repetition for one in unedited])
        if not len(surprise):
            raise InputError(
                "prompts", expected="some that the model answers", received="empty answers", remedy="pass others"
            )
        return cls(
            surprise=float(surprise.quantile(0.95)) + math.log(perplexity_factor),
            repetition=max(max_repetition, float(repeated.quantile(0.95))),
            judged=min_judged,
        )

    def incoherent(self, answers: Sequence[AnswerCoherence]) -> float:
        """The share of answers that are not coherent."""
        return sum(not self.holds(one) for one in answers) / len(answers)

    def holds(self, answer: AnswerCoherence) -> bool:
        """Whether an answer is coherent."""
        return (
            answer.surprise is not None
            and answer.surprise <= self.surprise
            and answer.repetition <= self.repetition
            and (answer.judged is None or answer.judged >= self.judged)
        )


@torch.inference_mode()
def measure_coherence(
    base: LanguageModel,
    prompts: Sequence[Conversation | str],
    answers: Sequence[Generation],
    *,
    judge: Judge | None = None,
    batch_tokens: int = 4096,
) -> list[AnswerCoherence]:
    """Signs of coherence of answers that were made under edits, or by another model.

    Args:
        base: the model that says how likely they are, without edits.
        prompts: what was asked.
        answers: in any order; `Generation.prompt` is the number of its prompt.
        judge: asked about every answer, once about equal ones.
        batch_tokens: padded tokens of a forward pass.

    Raises:
        InputError: if the judge gives another number of scores than it was asked for.
    """
    asked = tokenize_prompts(base, prompts)
    texts = [prompt if isinstance(prompt, str) else prompt.messages[-1].content for prompt in prompts]
    rows: dict[tuple[int, tuple[int, ...]], str] = {
        (answer.prompt, answer.token_ids): answer.text for answer in answers
    }
    spoken = [row for row in rows if row[1]]
    likelihoods = _surprises(base, [_continued(asked[number], ids) for number, ids in spoken], batch_tokens)
    surprise = dict(zip(spoken, likelihoods, strict=True))
    judged: Mapping[tuple[int, tuple[int, ...]], float | None] = {}
    if judge is not None:
        scores = judge([(texts[number], text) for (number, _), text in rows.items()])
        if len(scores) != len(rows):
            raise InputError(
                "judge", expected=f"{len(rows)} scores", received=len(scores), remedy="return one for each"
            )
        judged = dict(zip(rows, scores, strict=True))
    found = {
        row: AnswerCoherence(
            surprise.get(row), repetition(row[1]), judged.get(row), is_refusal(text), language_of(text)
        )
        for row, text in rows.items()
    }
    return [found[answer.prompt, answer.token_ids] for answer in answers]


def repetition(token_ids: Sequence[int]) -> float:
    """Share of trigrams that occurred before; 0 for fewer than three tokens."""
    trigrams = list(zip(token_ids, token_ids[1:], token_ids[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def is_refusal(text: str) -> bool:
    """Whether an answer opens as refusals do, in English."""
    return _REFUSAL.match(text.replace("\u2019", "'")) is not None


def language_of(text: str) -> str | None:
    """The language of a text (ISO 639-1); `None` where it is not clear, as in few words or noise."""
    language, confidence = _identifier().classify(text)
    return str(language) if confidence >= _SURE else None


@functools.cache
def _identifier() -> Any:
    from py3langid import langid

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def largest_coherent(incoherent: Mapping[float, float], most: float) -> tuple[float, float | None]:
    """How far strengths stay coherent, and which one to try next.

    Args:
        incoherent: share of incoherent answers by strength; all of one sign.
        most: the largest share that is borne.

    Returns:
        The strength furthest from 0 up to which all stay within it, 0 if not even the nearest does; and the strength
        halfway to the next, `None` if there is none.

    Raises:
        InputError: for strengths of both signs, or 0.
    """
    if len({math.copysign(1, strength) if strength else 0.0 for strength in incoherent} | {0.0}) > 2 or 0 in incoherent:
        raise InputError(
            "strengths", expected="all above 0, or all below", received=sorted(incoherent), remedy="search each way"
        )
    largest = 0.0
    for strength in sorted(incoherent, key=abs):
        if incoherent[strength] > most:
            return largest, float(f"{(largest + strength) / 2:.4g}")
        largest = strength
    return largest, None


def _continued(prompt: TokenizedConversation, answer: tuple[int, ...]) -> TokenizedConversation:
    roles = torch.full((len(answer),), int(Role.RESPONSE), dtype=prompt.roles.dtype)
    return TokenizedConversation(
        torch.cat([prompt.token_ids, torch.tensor(answer)]), torch.cat([prompt.roles, roles]), prompt.id
    )


def _surprises(base: LanguageModel, rows: Sequence[TokenizedConversation], batch_tokens: int) -> list[float]:
    """Mean negative log-probability of the answer's tokens of each row."""
    out = torch.zeros(len(rows))
    with base.active():
        for batch in make_batches(rows, batch_tokens=batch_tokens):
            scored: Tensor = (batch.roles & int(Role.RESPONSE)) != 0
            device = base.device
            values = token_log_probs(base, batch.token_ids.to(device), batch.mask.to(device), scored.to(device))
            totals = torch.zeros(scored.shape).masked_scatter_(scored, values.float().cpu())
            out[list(batch.rows)] = -totals.sum(1) / scored.sum(1)
    return out.tolist()
