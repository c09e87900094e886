"""From token ids to batches: nothing lost, nothing twice; what is cut is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

from saetools.data import (
    Conversation,
    Role,
    TokenizedConversation,
    TokenizeReport,
    make_batches,
    select_positions,
    tokenize,
)
from saetools.data.roles import POSITIONS
from saetools.errors import InputError

LONG = "All the king's horses and all the king's men. " * 40


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer()


def made_up(*lengths: int) -> list[TokenizedConversation]:
    generator = torch.Generator().manual_seed(0)
    return [
        TokenizedConversation(
            torch.randint(5, 100, (length,), generator=generator),
            torch.randint(1, 16, (length,), generator=generator, dtype=torch.uint8),
            str(number),
        )
        for number, length in enumerate(lengths)
    ]


def test_truncation_is_counted(tokenizer: Any) -> None:
    chats = [
        Conversation.chat(LONG, id="long"),
        Conversation.chat("Hi"),
        Conversation(text=LONG, id="text", source="s"),
    ]
    whole = list(tokenize(chats, tokenizer))
    report = TokenizeReport()
    cut = list(tokenize(chats, tokenizer, max_tokens=30, report=report))
    for long, short in zip(whole, cut, strict=True):
        assert torch.equal(short.token_ids, long.token_ids[:30])
        assert torch.equal(short.roles, long.roles[:30])
        assert (short.id, short.source) == (long.id, long.source)
    lengths = [len(piece) for piece in whole]
    assert (report.n_conversations, report.n_truncated) == (3, 2)
    assert report.n_tokens_cut == lengths[0] + lengths[2] - 60
    assert report.n_tokens == sum(map(len, cut))
    assert report.sources == {"": 30 + lengths[1], "s": 30}


@pytest.mark.parametrize("adds_bos", [False, True])
def test_long_texts_are_split(adds_bos: bool, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    whole = tokenizer(LONG, add_special_tokens=False)["input_ids"]
    report = TokenizeReport()
    texts = [Conversation(text=LONG, id="t"), Conversation(text="Short.", id="u")]
    *pieces, short = tokenize(texts, tokenizer, max_tokens=64, split_texts=True, report=report)
    bos = [tokenizer.bos_token_id] * adds_bos
    bodies = [piece.token_ids.tolist()[len(bos) :] for piece in pieces]
    assert [token for body in bodies for token in body] == whole
    assert all(piece.token_ids.tolist()[: len(bos)] == bos for piece in [*pieces, short])
    assert {len(piece) for piece in pieces[:-1]} == {64}
    assert [piece.id for piece in pieces] == [f"t@{start}" for start in range(0, len(whole), 64 - len(bos))]
    assert short.id == "u"
    assert [piece.roles.tolist() for piece in pieces] == [
        [int(Role.TEMPLATE)] * len(bos) + [int(Role.PROMPT)] * len(body) for body in bodies
    ]
    assert (report.n_truncated, report.n_conversations) == (0, len(pieces) + 1)
    assert report.n_tokens == sum(map(len, pieces)) + len(short)


def test_chats_are_cut_even_where_texts_are_split(tokenizer: Any) -> None:
    (piece,) = tokenize([Conversation.chat(LONG)], tokenizer, max_tokens=64, split_texts=True)
    assert len(piece) == 64


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("saetools.data.tokenizing"), "_CHUNK_CHARACTERS", 5000)


@pytest.mark.usefixtures("small_chunks")
def test_together_as_one_by_one(tokenizer: Any) -> None:
    rows = [
        Conversation(text=f"Text {n}. " + LONG) if n % 3 == 0 else Conversation.chat(f"What is {n}?", LONG[: n * 3])
        for n in range(50)
    ]
    together = list(tokenize(rows, tokenizer))
    assert len(together) == len(rows)
    for row, piece in list(zip(rows, together, strict=True))[::7]:
        (alone,) = tokenize([row], tokenizer)
        assert torch.equal(alone.token_ids, piece.token_ids)
        assert torch.equal(alone.roles, piece.roles)


@pytest.mark.usefixtures("small_chunks")
def test_streams(tokenizer: Any) -> None:
    def endless() -> Iterator[Conversation]:
        while True:
            yield Conversation.chat("Hi", "Hello.")

    stream = tokenize(endless(), tokenizer)
    assert len({len(next(stream)) for _ in range(100)}) == 1


def test_frames_are_rendered_once(make_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    calls = []
    real = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: calls.append(a) or real(*a, **k))
    list(tokenize([Conversation.chat(f"Question {n}", f"Answer {n}") for n in range(50)], tokenizer))
    assert len(calls) == 2 * 50 + 1  # with and without the answer, and one frame


@pytest.mark.parametrize(
    ("options", "rows", "problem"),
    [
        ({"max_tokens": 0}, ["Hi"], "more than 0 tokens"),
        ({"split_texts": True}, ["Hi"], "a length to split texts at"),
        (
            {"add_generation_prompt": True},
            [Conversation.chat("Hi", "Hello.", id="r1")],
            "r1, which ends with an answer",
        ),
        ({}, [Conversation(text="", id="r2")], "text that has tokens, received r2"),
        ({"add_generation_prompt": True, "max_tokens": 10}, [Conversation.chat(LONG, id="r3")], "r3 with"),
    ],
)
def test_errors(options: dict[str, Any], rows: list[Any], problem: str, tokenizer: Any) -> None:
    rows = [Conversation(text=row) if isinstance(row, str) else row for row in rows]
    with pytest.raises(InputError, match=problem):
        list(tokenize(rows, tokenizer, **options))


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(InputError, match="a fast tokenizer"):
        list(tokenize([Conversation(text="x")], object()))


@pytest.mark.parametrize("pad_left", [False, True])
def test_batches_hold_every_row_once(pad_left: bool) -> None:
    rows = made_up(3, 50, 1, 17, 17, 200, 8, 64, 2, 33)
    batches = list(make_batches(rows, batch_tokens=128, pad_left=pad_left, pad_id=7))
    assert sorted(number for batch in batches for number in batch.rows) == list(range(len(rows)))
    for batch in batches:
        assert batch.token_ids.shape == batch.mask.shape == batch.roles.shape
        assert batch.token_ids.numel() <= 128 or len(batch.rows) == 1
        assert torch.equal(batch.mask, select_positions(batch.roles, "all"))
        assert (batch.token_ids[~batch.mask] == 7).all()
        for row, number in enumerate(batch.rows):
            kept = batch.mask[row]
            assert torch.equal(batch.token_ids[row][kept], rows[number].token_ids)
            assert torch.equal(batch.roles[row][kept], rows[number].roles)
            first = int(kept.nonzero()[0])
            assert first == (kept.numel() - len(rows[number]) if pad_left else 0)
            without = batch.counted()[row]
            assert (kept ^ without).nonzero().flatten().tolist() == [first]
        assert torch.equal(batch.counted(skip_first=False), batch.mask)
    assert list(make_batches([])) == []


def test_positions_of_each_role() -> None:
    roles = torch.tensor([0, 1, 2, 4, 4 | 16, 8, 1], dtype=torch.uint8)
    at = {positions: select_positions(roles, positions).nonzero().flatten().tolist() for positions in POSITIONS}
    assert at == {
        "prompt": [2],
        "last_prompt": [4],
        "header": [3, 4],
        "response": [5],
        "template": [1, 6],
        "all": [1, 2, 3, 4, 5, 6],
    }
