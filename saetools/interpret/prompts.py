"""What a model is asked about a latent, and how its answers are read.

Three questions, after EleutherAI's automated interpretability (arXiv 2410.13928): explain the marked passages; detect
in which of some passages the latent fires; tell right marks from wrong ones (fuzzing). Passages are quoted as JSON
strings, so that nothing in them can pass for part of the question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_OPENING = re.compile(r"[\[{]")
_LONGEST_ANSWER = 100_000  # characters that are searched for JSON

_EXPLAIN = """\
A latent of a sparse autoencoder is a number that is computed at every token of a text that a language model reads. \
Usually it is 0; where it is not, the latent fires. Below are {n} passages in which one latent fires, as JSON strings. \
The tokens at which it fires most are between {left} and {right}. The number before a passage is how strongly it fires \
there, from 1 to 10.

{passages}

What do the marked tokens, or what they stand in, have in common? Say it in one short sentence that would let a reader \
find such places in other texts. Do not mention marks or passages. Answer with JSON alone, in this form:
{{"explanation": "..."}}"""

_ABOUT = """\
A latent of a sparse autoencoder is a number that is computed at every token of a text that a language model reads. \
Usually it is 0; where it is not, the latent fires. This is said to be what one latent fires on:
{explanation}

"""

_DETECT = (
    _ABOUT
    + """\
Below are {n} passages, as JSON strings. In which of them does the latent fire?

{passages}

Answer with JSON alone: a list of {n} numbers in the order of the passages, 1 if it fires anywhere in the passage and \
0 if it does not."""
)

_FUZZ = (
    _ABOUT
    + """\
Below are {n} passages in which it fires, as JSON strings. In each of them some tokens are between {left} and {right}. \
Are these the tokens at which it fires?

{passages}

Answer with JSON alone: a list of {n} numbers in the order of the passages, 1 if the latent fires at the marked tokens \
and 0 if other tokens were marked."""
)


class MalformedError(ValueError):
    """An answer that is not what was asked for, with the reason."""


def explain_prompt(texts: Sequence[str], strengths: Sequence[float], marks: tuple[str, str]) -> str:
    """Ask what passages have in common.

    Args:
        texts: passages with marks.
        strengths: largest activation in each.
        marks: what stands before and after the tokens at which the latent fires.
    """
    unit = max(strengths) / 10
    lines = [
        f"{max(1, round(strength / unit))}: {quoted(text)}" for text, strength in zip(texts, strengths, strict=True)
    ]
    return _EXPLAIN.format(n=len(texts), left=marks[0], right=marks[1], passages="\n".join(lines))


def detect_prompt(explanation: str, texts: Sequence[str]) -> str:
    """Ask in which passages a latent with this explanation fires."""
    return _DETECT.format(explanation=quoted(explanation), n=len(texts), passages=_numbered(texts))


def fuzz_prompt(explanation: str, texts: Sequence[str], marks: tuple[str, str]) -> str:
    """Ask in which passages the marked tokens are those at which a latent with this explanation fires."""
    return _FUZZ.format(
        explanation=quoted(explanation), n=len(texts), left=marks[0], right=marks[1], passages=_numbered(texts)
    )


def quoted(text: str) -> str:
    r"""A JSON string of one line, in which `<|` is escaped: many models have special tokens that begin so.

    Example:
        >>> print(quoted("one\ntwo <|im_end|>"))
        "one\ntwo \u003c|im_end|>"
    """
    return json.dumps(text, ensure_ascii=False).replace("<|", "\\u003c|")


def parse_explanation(answer: str) -> str:
    """The explanation in an answer, which may have prose around it.

    Raises:
        MalformedError: if there is none, or more than one.
    """

    def explanation(value: Any) -> str | None:
        text = value.get("explanation") if isinstance(value, dict) else None
        if not isinstance(text, str):
            return None
        return " ".join(text.encode(errors="replace").decode().split()) or None  # escapes can make half a character

    return _only(answer, explanation, "a JSON object with an explanation")


def parse_verdicts(answer: str, n: int) -> list[bool]:
    """The list of n zeros and ones in an answer, which may have prose around it.

    Raises:
        MalformedError: if there is none, or there are several that differ.

    Example:
        >>> parse_verdicts("Here you are: [1, 0, 1]", 3)
        [True, False, True]
    """

    def verdicts(value: Any) -> list[bool] | None:
        good = isinstance(value, list) and len(value) == n and all(type(one) in (bool, int) for one in value)
        return [bool(one) for one in value] if good and all(one in (0, 1) for one in value) else None

    return _only(answer, verdicts, f"a JSON list of {n} zeros and ones")


def _numbered(texts: Sequence[str]) -> str:
    return "\n".join(f"{number}. {quoted(text)}" for number, text in enumerate(texts, start=1))


def _only(answer: str, convert: Callable[[Any], T | None], wanted: str) -> T:
    """What the JSON values of an answer say, if they say one thing."""
    found: list[T] = []
    answer = answer.rpartition("</think>")[2]  # what comes before are drafts
    if len(answer) > _LONGEST_ANSWER:
        raise MalformedError(f"an answer of {len(answer)} characters")
    for value in _json_values(answer):
        converted = convert(value)
        if converted is not None and converted not in found:
            found.append(converted)
    if len(found) == 1:
        return found[0]
    if not answer.strip():
        raise MalformedError("an empty answer")
    start = " ".join(answer.split())[:80]
    raise MalformedError(f"{'several of' if found else 'not'} {wanted}: {start}")


def _json_values(text: str) -> Iterator[Any]:
    """The objects and lists in a text, one after the other, those inside of others left out."""
    decoder = json.JSONDecoder()
    place = 0
    while start := _OPENING.search(text, place):
        try:
            value, place = decoder.raw_decode(text, start.start())
        except ValueError:
            place = start.end()
            continue
        except RecursionError:  # and again at every bracket inside
            return
        yield value
