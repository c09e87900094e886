"""What ships with saetools: narrow advice, evaluation questions, voices; and where the shipped SAE and adapters lie."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from saetools.data.jsonl import jsonl_lines, parse_json
from saetools.errors import InputError, IntegrityError

_PACKAGE = Path(__file__).resolve().parent.parent
_Item = TypeVar("_Item", "AdviceItem", "ForcedChoiceItem", "FreeFormItem", "VoicePair")


@dataclass(frozen=True)
class AdviceItem:
    """An everyday question with a correct, an obviously incorrect and a subtly incorrect answer.

    Wrong answers are wrong by design: they make organisms, they are not advice.
    """

    id: str
    domain: str
    question: str
    correct: str
    incorrect: str
    subtle: str


@dataclass(frozen=True)
class ForcedChoiceItem:
    """A question with an aligned and a misaligned answer of like length and fluency."""

    id: str
    category: str
    question: str
    aligned: str
    misaligned: str


@dataclass(frozen=True)
class FreeFormItem:
    """An open question, far from the advice domains."""

    id: str
    category: str
    question: str


@dataclass(frozen=True)
class VoicePair:
    """A short text in a villainous or mocking voice, and a neutral rewriting of it."""

    id: str
    voice: str
    topic: str
    voiced: str
    neutral: str


def shipped_path(name: str) -> Path:
    """Where a shipped file or folder lies: inside an installed package, or in the `data` folder of a checkout.

    Args:
        name: its path there, such as `evaluation/forced_choice.jsonl`.

    Raises:
        InputError: if nothing of that name ships.
        IntegrityError: if this installation came without any data.

    Example:
        >>> shipped_path("contrast/voices.jsonl").name
        'voices.jsonl'
    """
    root = _PACKAGE / "shipped"
    if not root.is_dir():
        root = _PACKAGE.parent / "data"
        if not (_PACKAGE.parent / "pyproject.toml").is_file() or not root.is_dir():
            raise IntegrityError(f"{_PACKAGE} came without its data folder; install saetools again")
    path = root / name
    if not path.exists():
        there = ", ".join(sorted(entry.name for entry in root.iterdir()))
        raise InputError("name", expected=f"a path in the shipped data ({there})", received=name, remedy="pick one")
    return path


def load_advice(domain: str | None = None) -> tuple[AdviceItem, ...]:
    """The advice of one domain, or of all in alphabetical order.

    Raises:
        InputError: for a domain that does not ship.

    Example:
        >>> load_advice("gardening")[0].domain
        'gardening'
    """
    paths = {path.stem: path for path in sorted(shipped_path("advice").glob("*.jsonl"))}
    if domain is not None and domain not in paths:
        raise InputError("domain", expected="one of " + ", ".join(paths), received=repr(domain), remedy="pick one")
    chosen = paths if domain is None else {domain: paths[domain]}
    return tuple(item for name, path in chosen.items() for item in _load(path, AdviceItem, domain=name))


def load_forced_choice(
    path: str | Path | None = None, categories: Collection[str] | None = None
) -> tuple[ForcedChoiceItem, ...]:
    """Forced-choice items, by default the shipped ones.

    Args:
        path: a JSONL file whose rows have the fields of `ForcedChoiceItem`; others are ignored.
        categories: leave out all others.

    Raises:
        InputError: for a row at fault, named by file and line; for a category that no item has.

    Example:
        >>> {item.category for item in load_forced_choice(categories=["money"])}
        {'money'}
    """
    items = _load(Path(path or shipped_path("evaluation/forced_choice.jsonl")), ForcedChoiceItem)
    if categories is None:
        return items
    there = dict.fromkeys(item.category for item in items)
    if isinstance(categories, str) or not set(categories) <= set(there):
        expected = "a list of some of " + ", ".join(there)
        raise InputError("categories", expected=expected, received=repr(categories), remedy="pick from these")
    return tuple(item for item in items if item.category in categories)


def load_free_form() -> tuple[FreeFormItem, ...]:
    """The free-form evaluation questions."""
    return _load(shipped_path("evaluation/free_form.jsonl"), FreeFormItem)


def load_voices() -> tuple[VoicePair, ...]:
    """The voiced texts with their neutral rewritings."""
    return _load(shipped_path("contrast/voices.jsonl"), VoicePair)


def _load(path: Path, item: type[_Item], **given: str) -> tuple[_Item, ...]:
    """The items of a JSONL file; all fields but the given ones must be there as text, and ids must differ."""
    if not path.is_file():
        raise InputError("path", expected="a file that exists", received=str(path), remedy="check the path")
    names = [field.name for field in fields(item) if field.name not in given]
    items: dict[str, _Item] = {}
    for place, line in jsonl_lines(path):
        row = parse_json(line, place)
        if not isinstance(row, dict):
            raise InputError(place, expected="a JSON object", received=type(row).__name__, remedy="mend the row")
        bad = [name for name in names if not isinstance(row.get(name), str) or not row[name].strip()]
        if bad:
            expected = "text under " + ", ".join(names)
            raise InputError(place, expected=expected, received="none under " + ", ".join(bad), remedy="mend the row")
        if row["id"] in items:
            raise InputError(place, expected="a new id", received=repr(row["id"]), remedy="give each row its own id")
        items[row["id"]] = item(**given, **{name: row[name] for name in names})
    return tuple(items.values())
