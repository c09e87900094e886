"""Conversations and plain texts, as read from files or datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from saetools.data.jsonl import decode, jsonl_lines, parse_json
from saetools.errors import InputError, SaetoolsError

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn: `role` is `system`, `user` or `assistant`."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in _ROLES:
            raise InputError(
                "role", expected=f"one of {', '.join(_ROLES)}", received=repr(self.role), remedy="pick one"
            )


@dataclass(frozen=True)
class Conversation:
    """A chat, or a plain text if it has no messages.

    Args:
        messages: the turns; the last may be the user's (an answer is to be generated) or the assistant's.
        text: a plain text instead.
        id: how results call it.
        source: file or dataset it came from.

    Raises:
        InputError: unless there are either messages or a text.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    id: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.text is not None):
            received = "both" if self.messages else "neither"
            raise InputError("messages", expected="messages or a text", received=received, remedy="give one of them")

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

    Rows are mappings with `messages` (OpenAI style: a list of `{"role", "content"}`, where content is text or a list of
    text parts, and `developer` means `system`), with `prompt` and optional `response`, or with `text`.

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
    for name, place, load in _rows(source):
        report.n_rows += 1
        try:
            conversation = _parse(load(), name, place)
        except SaetoolsError as error:
            if not skip_bad:
                raise
            report.skip(error)
            continue
        yield conversation


def _rows(source: str | Path | Iterable[Any]) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """The name of the source, the place of a row for error messages, and a function that gives the row or raises."""
    if isinstance(source, str | Path):
        yield from _file_rows(Path(source).expanduser())
        return
    if isinstance(source, Mapping):
        raise InputError(
            "source",
            expected="rows",
            received=f"a {type(source).__name__} with the keys {', '.join(map(str, source))}",
            remedy="pass one split of a DatasetDict, or a list of rows",
        )
    name = getattr(getattr(source, "info", None), "dataset_name", None) or "row"
    for number, row in enumerate(source):
        yield name, f"{name}:{number}", partial(_same, row)


def _file_rows(path: Path) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    if not path.is_file():
        raise InputError("source", expected="a file that exists", received=str(path), remedy="check the path")
    match path.suffix:
        case ".jsonl":
            for place, line in jsonl_lines(path):
                yield path.name, place, partial(parse_json, line, place)
        case ".parquet":
            for number, row in enumerate(_parquet_rows(path), start=1):
                yield path.name, f"{path.name}:{number}", partial(_same, row)
        case ".txt":
            yield path.name, path.name, lambda: {"text": decode(path.read_bytes(), path.name)}
        case suffix:
            raise InputError(
                "source",
                expected="a .jsonl, .parquet or .txt file",
                received=repr(suffix),
                remedy="convert it, or pass the rows of a Hugging Face dataset",
            )


def _same(row: Any) -> Any:
    return row


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        for batch in pq.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(path.name, expected="a Parquet file", received=str(error), remedy="write it again") from error


def _parse(row: Any, source: str, place: str) -> Conversation:
    row = _plain(row)
    if not isinstance(row, Mapping):
        raise InputError(place, expected="a JSON object", received=type(row).__name__, remedy="mend the row")
    identifier = place if row.get("id") in (None, "") else str(row["id"])
    if (turns := _plain(row.get("messages"))) is not None:
        return Conversation(_parse_messages(turns, place), id=identifier, source=source)
    if (prompt := _plain(row.get("prompt"))) is not None:
        turns = [{"role": "user", "content": prompt}]
        if (response := _plain(row.get("response"))) is not None:
            turns.append({"role": "assistant", "content": response})
        return Conversation(_parse_messages(turns, place), id=identifier, source=source)
    if (text := _plain(row.get("text"))) is not None:
        if not isinstance(text, str) or not text.strip():
            received = "an empty one" if isinstance(text, str) else type(text).__name__
            raise InputError(place, expected="a text", received=received, remedy="drop the row, or set skip_bad")
        return Conversation(text=_encodable(text, place), id=identifier, source=source)
    raise InputError(
        place,
        expected="`messages`, `prompt` or `text`",
        received="keys " + (", ".join(map(str, row)) or "(none)"),
        remedy="rename the column",
    )


def _parse_messages(turns: Any, place: str) -> tuple[Message, ...]:
    if isinstance(turns, Mapping):  # a list of structs, as `datasets` gives a Sequence feature: a struct of lists
        columns = [_plain(turns.get(key)) for key in ("role", "content")]
        if all(isinstance(column, list | tuple) for column in columns) and len(columns[0]) == len(columns[1]):
            turns = [{"role": role, "content": content} for role, content in zip(*columns, strict=True)]
    if not isinstance(turns, list | tuple):
        raise InputError(place, expected="a list of turns", received=type(turns).__name__, remedy="mend the row")
    messages = []
    for number, turn in enumerate(map(_plain, turns)):
        role, content = (_plain(turn.get(key)) if isinstance(turn, Mapping) else None for key in ("role", "content"))
        role = "system" if role == "developer" else role  # OpenAI's newer name
        content = _joined(content)
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
        messages.append(Message(role, _encodable(content, place)))
    if not any(message.content.strip() for message in messages if message.role != "system"):
        raise InputError(
            place, expected="at least one turn with content", received="none", remedy="drop the row, or set skip_bad"
        )
    return tuple(messages)


def _joined(content: Any) -> Any:
    """The text of content that comes in parts, if all of them are text; anything else as it is."""
    parts = [_plain(part) for part in content] if isinstance(content, list | tuple) else []
    if parts and all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts):
        texts = [part.get("text") for part in parts]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else content
    return content


def _plain(value: Any) -> Any:
    """Python's own types for an Arrow or NumPy value."""
    for convert in ("as_py", "tolist"):
        if hasattr(value, convert):
            return getattr(value, convert)()
    return value


def _encodable(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(place, expected="Unicode text", received=str(error), remedy="mend the escapes") from error
    return text
