"""Numbers, intervals and text of models in words, the same in HTML and in Markdown."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Sequence
from typing import Any

from saetools.stats import Estimate

_MINUS = "\u2212"
_JOINERS = "\u200c\u200d"  # emoji and Persian need them


def visible(text: str) -> str:
    """Text in which whatever hides or reorders other text is spelled out, such as `[U+202E]`.

    Control and format characters (bidirectional ones among them), line separators and lone surrogates; line breaks,
    tabs and joiners stay.
    """
    text = text.replace("\r\n", "\n")
    return text if text.isprintable() else "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    if character in "\n\t" or character in _JOINERS:
        return character
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return f"[U+{ord(character):04X}]" if hidden else character


def token(text: str) -> str:
    """A token with its white space shown, so that ` the` and `the` differ."""
    return visible(text).replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5")


def number(value: float, digits: int = 3, *, signed: bool = False) -> str:
    """A number with fixed digits, in exponents where those would show nothing or too much."""
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "\u221e" if value > 0 else f"{_MINUS}\u221e"
    too_small = value != 0 and abs(value) < 0.5 * 10**-digits
    shape = ".1e" if too_small or abs(value) >= 1e6 else f",.{digits}f"
    return format(value, ("+" if signed else "") + shape).replace("-", _MINUS)


def percent(value: float) -> str:
    """A share in per cent."""
    return f"{number(100 * value, 2)} %"


def estimate(value: Estimate, *, signed: bool = False) -> str:
    """A mean with its interval."""
    return mean_and_interval(value.mean, value.low, value.high, signed=signed)


def mean_and_interval(mean: float, low: float | None, high: float | None, *, signed: bool = False) -> str:
    """A mean and its interval in brackets; ends that are not known are undefined."""
    return " ".join(interval(mean, low, high, signed=signed))


def interval(mean: float, low: float | None, high: float | None, *, signed: bool = False) -> tuple[str, str]:
    """A mean, and its interval in brackets, with as many digits as it takes to see on which side of zero they lie."""
    ends = [math.nan if value is None else value for value in (mean, low, high)]
    digits = next((d for d in (3, 4, 5) if all(not abs(x) < 0.5 * 10**-d for x in ends if x != 0)), 3)
    middle, left, right = (number(x, digits, signed=signed) for x in ends)
    return middle, f"[{left}, {right}]"


def some_latents(latents: Sequence[int], n_named: int = 4) -> str:
    """The first latents of a set by number, and how many more there are."""
    if not latents:
        return "no latents"
    names = ", ".join(map(str, latents[:n_named]))
    more = len(latents) - n_named
    return f"latent{'s' if len(latents) > 1 else ''} {names}" + (f" and {more} more" if more > 0 else "")


def plain(value: Any) -> str:
    """Any value of settings or provenance as text: words and numbers as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
