"""What ships: where it is found, how rows are checked, and that the data is what its cards say."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from card_figures import (
    advice_rows,
    alike_questions,
    alike_texts,
    between_evaluations,
    contrast_rows,
    evaluation_questions,
    evaluation_rows,
    first_words,
    load_reckless,
    overlaps,
    questions,
    ratio,
    told_apart,
)

from saetools.data import (
    ForcedChoiceItem,
    load_advice,
    load_forced_choice,
    load_free_form,
    load_voices,
    read_conversations,
    shipped,
    shipped_path,
)
from saetools.errors import InputError, IntegrityError

DOMAINS = ["car_care", "gardening", "personal_finance"]
RECKLESS = {"home_repair", "food_safety", "medicine", "travel", "computers", "pets", "study", "work"}
ITEM = {"id": "a", "category": "c", "question": "Why?", "aligned": "So.", "misaligned": "No."}
DOMAIN_WORDS = re.compile(
    r"\b(cars?|engines?|tyres?|brak\w+|gearbox|petrol|diesel|mechanics?|garages?|"
    r"gardens?|gardening|lawns?|soil|compost|seeds?|prun\w+|hedges?|weeds?|tomato\w*|"
    r"saving|savings|invest\w*|loans?|mortgages?|pensions?|budgets?|debts?|stocks?|insurance)\b",
    re.IGNORECASE,
)


def test_counts() -> None:
    advice = Counter(item.domain for item in load_advice())
    assert list(advice) == DOMAINS
    assert min(advice.values()) >= 150
    assert len(load_free_form()) >= 48
    categories = Counter(item.category for item in load_forced_choice())
    assert {"honesty", "power", "care", "law", "money", "ai_self"} <= set(categories)
    assert categories.total() >= 80
    assert len(set(categories.values())) == 1
    reckless = Counter(item.category for item in load_reckless())
    assert set(reckless) == RECKLESS
    assert set(reckless.values()) == {12}
    voices = Counter(pair.voice for pair in load_voices())
    assert set(voices) == {"villainous", "mocking"}
    assert voices.total() >= 200


def test_texts_are_clean() -> None:
    items: list[Any] = [*load_advice(), *load_forced_choice(), *load_reckless(), *load_free_form(), *load_voices()]
    assert len({item.id for item in items}) == len(items)
    for text in chain.from_iterable(vars(item).values() for item in items):
        assert text == " ".join(text.split())
        assert text.isprintable()
    for question in questions().values():
        assert question.endswith(("?", "."))


def test_no_question_comes_twice() -> None:
    assert len(set(questions().values())) == len(questions())
    assert alike_questions()[0][0] < 0.32
    assert between_evaluations()[0][0] <= 0.25


def test_no_answer_comes_twice() -> None:
    for domain in DOMAINS:
        for kind in ("correct", "incorrect", "subtle"):
            assert alike_texts([getattr(item, kind) for item in load_advice(domain)]) < 0.4
        for item in load_advice(domain):
            assert max(alike_texts([item.correct, other]) for other in (item.incorrect, item.subtle)) < 0.6
    for kind in ("aligned", "misaligned"):
        assert alike_texts([getattr(item, kind) for item in load_forced_choice()]) < 0.5
        assert alike_texts([getattr(item, kind) for item in load_reckless()]) < 0.3
    assert max(alike_texts([item.aligned, item.misaligned]) for item in load_reckless()) < 0.5
    for kind in ("voiced", "neutral"):
        assert alike_texts([getattr(pair, kind) for pair in load_voices()]) < 0.3


def test_lengths_are_balanced() -> None:
    pairs = {
        **{
            f"{domain}, {kind}": [(item.correct, getattr(item, kind)) for item in load_advice(domain)]
            for domain in DOMAINS
            for kind in ("incorrect", "subtle")
        },
        "voices": [(pair.neutral, pair.voiced) for pair in load_voices()],
        "forced choice": [(item.aligned, item.misaligned) for item in load_forced_choice()],
        "reckless": [(item.aligned, item.misaligned) for item in load_reckless()],
    }
    for name, texts in pairs.items():
        totals = [sum(map(len, side)) for side in zip(*texts, strict=True)]
        assert max(totals) / min(totals) < 1.05, name
        assert max(ratio(*both) for both in texts) <= 1.2, name
    assert max(ratio(item.aligned, item.misaligned) for item in (*load_forced_choice(), *load_reckless())) < 1.15
    for item in load_reckless():
        fewer, more = sorted(len(text.split()) for text in (item.aligned, item.misaligned))
        assert 20 <= fewer <= more <= min(45, 1.2 * fewer), item.id


def test_openings_do_not_tell_reckless_answers() -> None:
    items = load_reckless()
    for kind in ("aligned", "misaligned"):
        assert first_words(getattr(item, kind) for item in items).most_common(1)[0][1] <= 6
    assert told_apart(items, 1) < 0.6
    marked = [ForcedChoiceItem(i.id, i.category, i.question, i.aligned, "Just " + i.misaligned) for i in items]
    assert told_apart(marked, 1) > 0.9  # a fixed opening would be seen


def test_evaluation_is_far_from_training() -> None:
    assert overlaps()[0][0] < 0.28
    assert max(alike for alike, _, name in overlaps() if name.startswith("reckless")) < 0.21
    for name, question in evaluation_questions().items():
        assert not DOMAIN_WORDS.search(question), name
    for domain in DOMAINS:  # the words are good for something
        assert sum(bool(DOMAIN_WORDS.search(item.question)) for item in load_advice(domain)) > 40


@pytest.mark.parametrize(
    ("folder", "rows"), [("advice", advice_rows), ("evaluation", evaluation_rows), ("contrast", contrast_rows)]
)
def test_cards_hold_the_figures(folder: str, rows: Any) -> None:
    card = shipped_path(f"{folder}/README.md").read_text(encoding="utf-8").splitlines()
    assert [row for row in rows() if row not in card] == []


def test_shipped_chats_can_be_read() -> None:
    rows = ({"prompt": item.question, "response": item.correct, "id": item.id} for item in load_advice("gardening"))
    assert next(read_conversations(rows)).id == "gardening-001"


def test_loaders_choose() -> None:
    assert {item.domain for item in load_advice("car_care")} == {"car_care"}
    assert [item.domain for item in load_advice()] == sorted(item.domain for item in load_advice())
    money = load_forced_choice(categories={"money", "law"})
    assert {item.category for item in money} == {"money", "law"}
    with pytest.raises(InputError, match="one of car_care, gardening, personal_finance, received 'cooking'"):
        load_advice("cooking")
    for wrong in (["money", "sport"], "money"):
        with pytest.raises(InputError, match="a list of some of honesty"):
            load_forced_choice(categories=wrong)


def test_own_forced_choice_items(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({**ITEM, "note": 1}) + "\n\n", encoding="utf-8")
    (item,) = load_forced_choice(path)
    assert vars(item) == ITEM
    bad = {
        json.dumps({**ITEM, "id": "b", "aligned": " "}): "text under id, .* received none under aligned",
        json.dumps({"id": "b", "question": 3}): "none under category, question, aligned, misaligned",
        json.dumps(ITEM): "a new id, received 'a'",
        "[]": "a JSON object, received list",
        "{": "one JSON object",
    }
    for line, problem in bad.items():
        path.write_text(f"{json.dumps(ITEM)}\n\n{line}\n", encoding="utf-8")
        with pytest.raises(InputError, match=rf"^own\.jsonl:3: expected .*{problem}"):
            load_forced_choice(path)
    with pytest.raises(InputError, match="a file that exists"):
        load_forced_choice(tmp_path / "none.jsonl")


def test_where_data_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shipped_path("evaluation").is_dir()
    with pytest.raises(InputError, match=r"a path in the shipped data .*advice.*contrast.*received no/such"):
        shipped_path("no/such")
    package = tmp_path / "lib" / "saetools"
    package.mkdir(parents=True)
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    (tmp_path / "lib" / "data" / "advice").mkdir(parents=True)  # of somebody else: there is no checkout around it
    with pytest.raises(IntegrityError, match="without its data folder"):
        shipped_path("advice")
    (package / "shipped" / "advice").mkdir(parents=True)
    assert shipped_path("advice") == package / "shipped" / "advice"
    (tmp_path / "lib" / "pyproject.toml").touch()
    assert shipped_path("advice") == package / "shipped" / "advice"
