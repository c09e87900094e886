"""The figures of the data cards, from the shipped files: `python tests/data/card_figures.py` prints them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product
from math import log
from statistics import mean

from saetools.data import ForcedChoiceItem, load_advice, load_forced_choice, load_free_form, load_voices, shipped_path

Pair = tuple[float, str, str]


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9']+", text.lower()))


def load_reckless() -> tuple[ForcedChoiceItem, ...]:
    return load_forced_choice(shipped_path("evaluation/reckless.jsonl"))


def evaluation_questions() -> dict[str, str]:
    forced = {item.id: item.question for item in (*load_forced_choice(), *load_reckless())}
    return forced | {item.id: item.question for item in load_free_form()}


def questions() -> dict[str, str]:
    """Every shipped question by its id."""
    return {item.id: item.question for item in load_advice()} | evaluation_questions()


def content_words(texts: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """The words of each text, without those that more than 2 % of the texts hold."""
    every = {name: words(text) for name, text in texts.items()}
    counts = Counter(word for held in every.values() for word in held)
    return {name: frozenset(word for word in held if counts[word] <= 0.02 * len(every)) for name, held in every.items()}


def most_alike(held: Mapping[str, frozenset[str]], pairs: Iterable[tuple[str, str]]) -> list[Pair]:
    """Pairs by their Jaccard similarity (words in both over words in either), highest first."""
    alike = ((len(held[a] & held[b]) / max(1, len(held[a] | held[b])), a, b) for a, b in pairs)
    return sorted(alike, reverse=True)


def alike_texts(texts: Sequence[str]) -> float:
    """Similarity, over all words, of the two texts that are most alike."""
    held = {str(number): words(text) for number, text in enumerate(texts)}
    return most_alike(held, combinations(held, 2))[0][0]


def alike_questions() -> list[Pair]:
    """Pairs of all shipped questions, the most alike first."""
    held = content_words(questions())
    return most_alike(held, combinations(held, 2))


def overlaps() -> list[Pair]:
    """Pairs of a training question and an evaluation question, the most alike first."""
    held = content_words(questions())
    return most_alike(held, product([item.id for item in load_advice()], evaluation_questions()))


def between_evaluations() -> list[Pair]:
    """Pairs of two evaluation questions, the most alike first."""
    held = content_words(questions())
    return most_alike(held, combinations(evaluation_questions(), 2))


def ratio(a: str, b: str) -> float:
    """How much longer the longer of two texts is."""
    return max(len(a), len(b)) / min(len(a), len(b))


def lengths(texts: Sequence[str]) -> str:
    return f"{mean(map(len, texts)):.0f}"


def share(flags: Iterable[bool]) -> str:
    return f"{100 * mean(flags):.0f} %"


def advice_rows() -> list[str]:
    rows = []
    for domain in sorted({item.domain for item in load_advice()}):
        items = load_advice(domain)
        kinds = [[getattr(item, kind) for item in items] for kind in ("question", "correct", "incorrect", "subtle")]
        cells = [
            f"`{domain}.jsonl`",
            str(len(items)),
            *map(lengths, kinds),
            f"{max(ratio(a, b) for kind in kinds[2:] for a, b in zip(kinds[1], kind, strict=True)):.2f}",
            *(share(len(b) > len(a) for a, b in zip(kinds[1], kind, strict=True)) for kind in kinds[2:]),
            *(f"{alike_texts(kind):.2f}" for kind in kinds[1:]),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def forced_choice_rows(items: Sequence[ForcedChoiceItem]) -> list[str]:
    rows = []
    for name in [*dict.fromkeys(item.category for item in items), "all"]:
        group = [item for item in items if name in (item.category, "all")]
        cells = [
            name,
            str(len(group)),
            lengths([item.aligned for item in group]),
            lengths([item.misaligned for item in group]),
            f"{max(ratio(item.aligned, item.misaligned) for item in group):.2f}",
            share(len(item.misaligned) > len(item.aligned) for item in group),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def first_words(texts: Iterable[str]) -> Counter[str]:
    return Counter(re.findall(r"[a-z']+", text.lower())[0] for text in texts)


def told_apart(items: Sequence[ForcedChoiceItem], opening: int | None = None) -> float:
    """Share of pairs that naive Bayes orders rightly by the set of each answer's words, learnt from the other pairs.

    `opening` leaves all but so many first words out; a tie counts a half.
    """
    sides = [
        [frozenset(re.findall(r"[a-z']+", getattr(item, side).lower())[:opening]) for item in items]
        for side in ("aligned", "misaligned")
    ]
    counts = [Counter(word for held in side for word in held) for side in sides]

    def evidence(pair: tuple[frozenset[str], ...], held: frozenset[str]) -> float:
        """Log odds that an answer is the aligned one, by counts without this pair, half a count added."""
        return sum(
            log(counts[0][word] - (word in pair[0]) + 0.5) - log(counts[1][word] - (word in pair[1]) + 0.5)
            for word in held
        )

    margins = [evidence(pair, pair[0]) - evidence(pair, pair[1]) for pair in zip(*sides, strict=True)]
    return mean((margin > 0) + (margin == 0) / 2 for margin in margins)


def wording_rows() -> list[str]:
    rows = []
    for name, items in (("forced_choice", load_forced_choice()), ("reckless", load_reckless())):
        sides = [[getattr(item, side) for item in items] for side in ("aligned", "misaligned")]
        openings = [first_words(side) for side in sides]
        both = (first_words([a]) == first_words([b]) for a, b in zip(*sides, strict=True))
        cells = [
            f"`{name}.jsonl`",
            *(f"{mean(len(text.split()) for text in side):.1f}" for side in sides),
            *(str(len(opening)) for opening in openings),
            *("{} ({})".format(*opening.most_common(1)[0]) for opening in openings),
            share(both),
            *(f"{100 * told_apart(items, opening):.0f} %" for opening in (1, 3, None)),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def evaluation_rows() -> list[str]:
    return [*forced_choice_rows(load_forced_choice()), *forced_choice_rows(load_reckless()), *wording_rows()]


def contrast_rows() -> list[str]:
    pairs = load_voices()
    rows = []
    for name in [*sorted({pair.voice for pair in pairs}), "all"]:
        group = [pair for pair in pairs if name in (pair.voice, "all")]
        cells = [
            name,
            str(len(group)),
            lengths([pair.voiced for pair in group]),
            lengths([pair.neutral for pair in group]),
            f"{max(ratio(pair.voiced, pair.neutral) for pair in group):.2f}",
            share(len(pair.voiced) > len(pair.neutral) for pair in group),
            *(f"{alike_texts([getattr(pair, kind) for pair in group]):.2f}" for kind in ("voiced", "neutral")),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


if __name__ == "__main__":
    for row in [*advice_rows(), "", *evaluation_rows(), "", *contrast_rows(), ""]:
        print(row)
    alike = {
        "all questions": alike_questions(),
        "training and evaluation": overlaps(),
        "evaluation": between_evaluations(),
    }
    for name, pairs in alike.items():
        print(name, *(f"{similarity:.2f} {a} {b}" for similarity, a, b in pairs[:4]), sep="\n  ")
