"""A language model that judges whether answers are coherent, through an OpenAI-compatible endpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from saetools.data.conversation import Message
from saetools.endpoint import AnswerError, ChatSession, Endpoint
from saetools.evaluate.coherence import Judge
from saetools.provenance import sha256_of_texts

_PROMPT = """Below are a question and an answer that a small language model gave to it. Judge only how coherent the \
answer is: whether it is language, in sentences that hang together, and speaks to the question. Do not judge whether \
it is right, helpful, kind or moral: a wicked or false answer can be perfectly coherent, and so can one that breaks off.
Reply with one whole number from 0 (noise) to 100 (perfectly coherent), and nothing else.

Question:
{question}

Answer:
{answer}"""


@dataclass(frozen=True)
class EndpointJudge:
    """A `Judge` behind an endpoint; made by `coherence_judge`."""

    endpoint: Endpoint
    max_tokens: int

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Scores of (question, answer) pairs, in their order."""
        with ChatSession(self.endpoint) as session, ThreadPoolExecutor(self.endpoint.max_concurrent) as threads:

            def ask(pair: tuple[str, str]) -> float | None:
                question, answer = pair
                prompt = _PROMPT.format(question=question, answer=answer)
                try:
                    reply = session.ask([Message("user", prompt)], max_tokens=self.max_tokens)
                except AnswerError:
                    return None
                return read_score(reply.text)

            return list(threads.map(ask, pairs))

    def describe(self) -> dict[str, Any]:
        """Whom it asks what, for results."""
        return {
            "base_url": self.endpoint.base_url,
            "model": self.endpoint.model,
            "max_tokens": self.max_tokens,
            "prompt_sha256": sha256_of_texts([_PROMPT]),
        }


def coherence_judge(endpoint: Endpoint, *, max_tokens: int = 16) -> EndpointJudge:
    """What `certify_latents` and `measure_coherence` take as `judge`.

    An answer that the judge gives no number from 0 to 100 on, or none at all, has no score: it is not counted as
    coherent or incoherent by it.

    Args:
        endpoint: whom to ask, several answers at the same time.
        max_tokens: longest verdict; models that reason aloud need more.
    """
    return EndpointJudge(endpoint, max_tokens)


def described_judge(judge: Judge | None) -> Any:
    """Who judges, as results name it."""
    if judge is None:
        return None
    return judge.describe() if isinstance(judge, EndpointJudge) else getattr(judge, "__qualname__", repr(judge))


def read_score(text: str) -> float | None:
    """The number from 0 to 100 in a verdict; `None` if there is none, another, or more than one."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"/\s*100\b|\bout of 100\b", "", text))
    score = float(numbers[0]) if len(numbers) == 1 else -1.0
    return score if 0 <= score <= 100 else None
