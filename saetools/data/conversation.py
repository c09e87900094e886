"""Conversations and plain texts, as read from files or datasets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saetools.errors import InputError, SaetoolsError

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn: `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """A chat, or a plain text if it has no messages.

    Args:
        messages: the turns; the last may be the user's (an answer is to be generated) or the assistant's.
        text: a plain text instead.
        id: how results call it.
        source: file or dataset it came from.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    id: str = ""
    source: str = ""

    @classmethod
    def chat(cls, user: str, assistant: str | None = None, *, system: str | None = None, id: str = "") -> Conversation:
        """A single exchange; without `assistant`, a prompt to answer.

        Example:
            >>> Conversation.chat("How are you?", "Well.").messages[1].role
            'assistant'
        """
        turns = [("system", system), ("user", user), ("assistant", assistant)]
        return cls(tuple(Message(role, content) for role, content in turns if content is not None), id=id)

    @property
    def is_prompt(self) -> bool:
        """Whether it ends with a user's turn, so that a model can answer it."""
        return bool(self.messages) and self.messages[-1].role != "assistant"


@dataclass
class ReadReport:
    """Counts of a reading pass, filled while the rows are read."""

    n_rows: int = 0
    n_skipped: int = 0
    first_errors: list[str] = field(default_factory=list)

    def skip(self, error: SaetoolsError) -> None:
        """Count a bad row; the first few messages are kept."""
        self.n_skipped += 1
        if len(self.first_errors) < 5:
            self.first_errors.append(str(error))


def read_conversations(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    skip_bad: bool = False,
    report: ReadReport | None = None,
) -> Iterator[Conversation]:
    """Read conversations or texts one by one.

    Rows are mappings with `messages` (OpenAI style: a list of `{"role", "content"}`), with `prompt` and optional
    `response`, or with `text`.

    Args:
        source: a `.jsonl` file (one JSON object a line), a `.parquet` file, a `.txt` file (one document), or any
            iterable of rows: a Hugging Face dataset, streaming or not.
        skip_bad: count bad rows in `report` instead of raising.
        report: filled with counts while reading.

    Raises:
        InputError: for a bad row, named by file and line; for an unknown file type.

    Example:
        >>> rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}]
        >>> next(read_conversations(rows)).messages[1].content
        'Hello.'
    """
    report = report if report is not None else ReadReport()
    for place, load in _rows(source):
        report.n_rows += 1
        try:
            conversation = _parse(load(), place)
        except SaetoolsError as error:
            if not skip_bad:
                raise
            report.skip(error)
            continue
        yield conversation


def _rows(source: str | Path | Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Pairs of a place, for error messages, and a function that gives the row or raises."""
    if not isinstance(source, str | Path):
        name = getattr(getattr(source, "info", None), "dataset_name", None) or "row"
        for number, row in enumerate(source):
            yield f"{name}:{number}", lambda row=row: row
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError("source", expected="a file that exists", received=str(path), remedy="check the path")
    match path.suffix:
        case ".jsonl":
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        place = f"{path.name}:{number}"
                        yield place, lambda line=line, place=place: _parse_json(line, place)
        case ".parquet":
            yield from _parquet_rows(path)
        case ".txt":
            yield path.name, lambda: {"text": _decode(path.read_bytes(), path.name)}
        case suffix:
            raise InputError(
                "source",
                expected="a .jsonl, .parquet or .txt file",
                received=repr(suffix),
                remedy="convert it, or pass the rows of a Hugging Face dataset",
            )


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import polars as pl

    try:
        n_rows = pl.scan_parquet(path).select(pl.len()).collect().item()
    except pl.exceptions.PolarsError as error:
        raise InputError(
            "source", expected="a readable Parquet file", received=f"{path.name} ({error})", remedy="write it again"
        ) from error
    for start in range(0, n_rows, 1024):
        for offset, row in enumerate(pl.scan_parquet(path).slice(start, 1024).collect().iter_rows(named=True)):
            yield f"{path.name}:{start + offset + 1}", lambda row=row: row


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            place, expected="UTF-8 text", received=str(error), remedy="convert the file to UTF-8"
        ) from error


def _parse_json(line: bytes, place: str) -> Any:
    try:
        return json.loads(_decode(line, place))
    except json.JSONDecodeError as error:
        raise InputError(place, expected="one JSON object", received=str(error), remedy="mend the line") from error


def _parse(row: Any, place: str) -> Conversation:
    if not isinstance(row, Mapping):
        raise InputError(place, expected="a JSON object", received=type(row).__name__, remedy="mend the row")
    source = place.rsplit(":", 1)[0]
    identifier = str(row.get("id") or place)
    if isinstance(row.get("messages"), Sequence) and not isinstance(row["messages"], str):
        return Conversation(_parse_messages(row["messages"], place), id=identifier, source=source)
    if isinstance(row.get("prompt"), str):
        turns = [{"role": "user", "content": row["prompt"]}]
        if row.get("response") is not None:
            turns.append({"role": "assistant", "content": row["response"]})
        return Conversation(_parse_messages(turns, place), id=identifier, source=source)
    if isinstance(row.get("text"), str):
        if not row["text"].strip():
            raise InputError(place, expected="a text", received="an empty one", remedy="drop the row, or set skip_bad")
        return Conversation(text=row["text"], id=identifier, source=source)
    raise InputError(
        place,
        expected="`messages`, `prompt` or `text`",
        received="keys " + (", ".join(map(str, row)) or "(none)"),
        remedy="rename the column",
    )


def _parse_messages(turns: Sequence[Any], place: str) -> tuple[Message, ...]:
    messages = []
    for number, turn in enumerate(turns):
        role = turn.get("role") if isinstance(turn, Mapping) else None
        content = turn.get("content") if isinstance(turn, Mapping) else None
        if role not in _ROLES or not isinstance(content, str):
            raise InputError(
                place,
                expected="turns with a role of " + ", ".join(_ROLES) + " and text as content",
                received=f"turn {number}: role {role!r}, content of type {type(content).__name__}",
                remedy="mend the turn, or set skip_bad",
            )
        if role == "system" and number:
            raise InputError(
                place, expected="a system turn only at the start", received=f"one at turn {number}", remedy="move it"
            )
        messages.append(Message(role, content))
    if not any(message.content.strip() for message in messages if message.role != "system"):
        raise InputError(
            place, expected="at least one turn with content", received="none", remedy="drop the row, or set skip_bad"
        )
    return tuple(messages)
