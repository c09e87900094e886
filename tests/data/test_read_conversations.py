"""Reading conversations from files and datasets: what is accepted, and errors that name file and line."""

from __future__ import annotations

import json
from inspect import unwrap
from pathlib import Path
from typing import Any

import pytest

from saetools.data import Conversation, Message, ReadReport, read_conversations
from saetools.errors import InputError

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
TURNS = (Message("user", "Hi"), Message("assistant", "Hello."))


def write(folder: Path, *lines: str | bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_jsonl(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        b"\xef\xbb\xbf" + json.dumps(CHAT).encode(),  # a byte order mark, as some editors write
        "",
        "   ",
        json.dumps({"id": 0, "prompt": "Why?"}) + "\r",
        json.dumps({"id": "x", "prompt": "Why?", "response": "So."}),
        json.dumps({"messages": None, "text": "A text.\u2028With an odd line end."}, ensure_ascii=False),
        json.dumps({"messages": [{"role": "system", "content": "Be brief."}, *CHAT["messages"]], "extra": [1]}),
    )
    report = ReadReport()
    rows = list(read_conversations(path, report=report))
    assert rows == [
        Conversation(TURNS, id="rows.jsonl:1", source="rows.jsonl"),
        Conversation((Message("user", "Why?"),), id="0", source="rows.jsonl"),
        Conversation((Message("user", "Why?"), Message("assistant", "So.")), id="x", source="rows.jsonl"),
        Conversation(text="A text.\u2028With an odd line end.", id="rows.jsonl:6", source="rows.jsonl"),
        Conversation((Message("system", "Be brief."), *TURNS), id="rows.jsonl:7", source="rows.jsonl"),
    ]
    assert [row.is_prompt for row in rows] == [False, True, False, False, False]
    assert (report.n_rows, report.n_skipped) == (5, 0)


BAD = [
    ('{"messages": [', "one JSON object"),
    ("[" * 100_000, "one JSON object"),
    (f'{{"id": {"9" * 5000}}}', "one JSON object"),
    (b'{"text": "\xff"}', "UTF-8 text"),
    ('{"text": "\\ud800"}', "Unicode text"),
    ('{"messages": [{"role": "user", "content": "\\udfff"}]}', "Unicode text"),
    ("[1]", "a JSON object, received list"),
    ("null", "a JSON object, received NoneType"),
    ("{}", r"keys \(none\)"),
    ('{"question": "Why?"}', "keys question; rename"),
    ('{"messages": "Hi"}', "a list of turns, received str"),
    ('{"messages": {"role": "user"}}', "a list of turns, received dict"),
    ('{"messages": []}', "at least one turn with content"),
    ('{"messages": ["Hi"]}', "turn 0: role None"),
    ('{"messages": [{"role": "user"}]}', "turn 0: role 'user', content of type NoneType"),
    ('{"messages": [{"content": "Hi"}]}', "turn 0: role None"),
    ('{"messages": [{"role": "user", "content": 3}]}', "content of type int"),
    ('{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}', "content of type list"),
    ('{"messages": [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "x"}]}', "turn 1: role 'tool'"),
    ('{"messages": [{"role": ["user"], "content": "Hi"}]}', "turn 0: role"),
    ('{"messages": [{"role": "user", "content": "Hi"}, {"role": "system", "content": "x"}]}', "one at turn 1"),
    ('{"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": " "}]}', "at least one turn"),
    ('{"prompt": ["Hi"]}', "turn 0: role 'user', content of type list"),
    ('{"prompt": "Hi", "response": 1}', "turn 1"),
    ('{"text": ""}', "a text, received an empty one"),
    ('{"text": 5}', "a text, received int"),
]


@pytest.mark.parametrize(("line", "problem"), BAD)
def test_bad_rows_are_named(line: str | bytes, problem: str, tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(CHAT), "", line, json.dumps(CHAT))
    rows = read_conversations(path)
    assert next(rows).messages == TURNS
    with pytest.raises(InputError, match=rf"^rows\.jsonl:3: expected .*{problem}"):
        next(rows)


def test_bad_rows_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, *(line for bad, _ in BAD for line in (bad, json.dumps(CHAT))))
    report = ReadReport()
    rows = list(read_conversations(path, skip_bad=True, report=report))
    assert [row.messages for row in rows] == [TURNS] * len(BAD)
    assert (report.n_rows, report.n_skipped) == (2 * len(BAD), len(BAD))
    assert [error.split(":")[1] for error in report.first_errors] == ["1", "3", "5", "7", "9"]


def test_text_file(tmp_path: Path) -> None:
    text = "One document.\r\n\nÜber mehrere Zeilen.\n"
    (row,) = read_conversations(write(tmp_path, b"\xef\xbb\xbf" + text.encode(), name="a:b.txt"))
    assert row == Conversation(text=text, id="a:b.txt", source="a:b.txt")
    for content, problem in ((b"\xff\xfe", "UTF-8"), (b" \n", "empty")):
        with pytest.raises(InputError, match=rf"^x\.txt: .*{problem}"):
            list(read_conversations(write(tmp_path, content, name="x.txt")))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for name, problem in (("no.jsonl", "exists"), ("folder.jsonl", "exists"), ("rows.csv", r"\.jsonl, \.parquet or")):
        if name == "rows.csv":
            write(tmp_path, "a,b", name=name)
        with pytest.raises(InputError, match=problem):
            list(read_conversations(str(tmp_path / name)))
    assert list(read_conversations(write(tmp_path))) == []


def test_parquet(tmp_path: Path) -> None:
    import polars as pl
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pl.DataFrame({"messages": [CHAT["messages"]] * 2, "id": [7, 8]}).write_parquet(path)
    assert [(row.id, row.messages) for row in read_conversations(path)] == [("7", TURNS), ("8", TURNS)]
    table = pa.table({"messages": pa.array([CHAT["messages"]] * 2500), "text": pa.nulls(2500, pa.string())})
    pq.write_table(table, path, row_group_size=999)
    rows = list(read_conversations(path))
    assert {row.messages for row in rows} == {TURNS}
    assert [row.id for row in rows] == [f"rows.parquet:{n}" for n in range(1, 2501)]
    pl.DataFrame({"text": ["A.", None, "B."]}).write_parquet(path)
    report = ReadReport()
    assert [row.text for row in read_conversations(path, skip_bad=True, report=report)] == ["A.", "B."]
    assert report.first_errors[0].startswith("rows.parquet:2: ")
    for damaged in (b"PAR1 not really PAR1", path.read_bytes()[:-50], b""):
        with pytest.raises(InputError, match=r"^rows\.parquet: expected a Parquet file"):
            list(read_conversations(write(tmp_path, damaged, name="rows.parquet")))


def test_datasets() -> None:
    from datasets import Dataset, DatasetDict, Features, IterableDataset, Value

    rows = [{**CHAT, "id": "a"}, {**CHAT, "id": "b"}]
    dataset = Dataset.from_list(rows)
    expected = [("a", TURNS), ("b", TURNS)]
    variants: list[Any] = [dataset, dataset.to_iterable_dataset(), IterableDataset.from_generator(lambda: iter(rows))]
    variants += [dataset.with_format(kind) for kind in ("numpy", "torch")]
    variants += [dataset.to_polars().iter_rows(named=True), dataset.to_pandas().to_dict("records")]
    variants += [[{name: dataset.data[name][i] for name in ("id", "messages")} for i in range(2)]]  # Arrow scalars
    for variant in variants:
        assert [(row.id, row.messages) for row in read_conversations(variant)] == expected, variant
    columns = {"messages": {"role": [Value("string")], "content": [Value("string")]}}  # a struct of lists
    turned = {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Hello."]}}
    structs = Dataset.from_list([turned], features=Features(columns))
    assert [row.messages for row in read_conversations(structs)] == [TURNS]
    with pytest.raises(InputError, match="a DatasetDict with the keys train; pass one split"):
        list(unwrap(read_conversations)(DatasetDict(train=dataset)))


def test_rows_are_read_one_by_one() -> None:
    def rows() -> Any:
        yield CHAT
        raise RuntimeError("read too far")

    assert next(read_conversations(rows())).id == "row:0"
    with pytest.raises(InputError, match=r"^row:1: expected a JSON object, received int"):
        list(read_conversations(iter([CHAT, 3])))  # type: ignore[list-item]


def test_conversations_hold_messages_or_a_text() -> None:
    assert Conversation.chat("Hi", system="Be brief.").is_prompt
    for wrong in ({}, {"messages": TURNS, "text": "x"}):
        with pytest.raises(InputError, match="messages or a text"):
            Conversation(**wrong)
    with pytest.raises(InputError, match="'tool'"):
        Message("tool", "x")


def test_openai_parts_and_developers() -> None:
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi."}]
    turns = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    (conversation,) = read_conversations([{"messages": turns}])
    assert [(turn.role, turn.content) for turn in conversation.messages] == [
        ("system", "Be brief."),
        ("user", "Say hi."),
    ]
    for bad in ([{"type": "image_url", "image_url": "x"}], [{"type": "text"}], []):
        with pytest.raises(InputError, match="turns with a role of system, user, assistant and text as content"):
            next(read_conversations([{"messages": [{"role": "user", "content": bad}]}]))
