"""Chats: every voice has its history and its edits, and what was said can be kept."""

import itertools
import json

import pytest
import torch
from tiny_sae import make_sae, with_random_adapter

from saetools import Conversation, SamplingConfig, Site, generate, steer
from saetools.chat import Chat, ChatConfig, Turn, save_transcript
from saetools.data import Message
from saetools.engine import Engine
from saetools.errors import InputError, NonFiniteError

SITE = Site(1)
V = 3 * torch.randn(32, generator=torch.Generator().manual_seed(2))
CONFIG = ChatConfig(max_new_tokens=6, temperature=0.0, system="Be brief.")


@pytest.fixture(scope="module")
def lm(make_tiny):
    return with_random_adapter(make_tiny("llama"))


@pytest.fixture
def chat(lm):
    sources = {"sae": make_sae(), "site": SITE, "directions": {"evil": {SITE: V, Site(0): V}}}
    with Engine({"base": lm.base, "tuned": lm}) as engine:
        yield Chat(engine, "tuned", sources, CONFIG)


def said(chat, question):
    *_, last = chat.ask(question)
    return last


def alone(lm, edits, *turns):
    messages = (Message("system", "Be brief."), *(Message(*turn) for turn in turns))
    config = SamplingConfig(6, temperature=0.0)
    return generate(lm, [Conversation(messages)], variants={"x": edits}, config=config)[0].text


def test_every_voice_goes_on_with_what_it_said_itself(lm, chat):
    first = said(chat, "Hi")
    assert list(first) == ["base", "tuned", "steered"]
    assert first["steered"] == first["tuned"]
    assert chat.add_edit("add_direction evil=1  on response") == "add_direction evil=1 on response"
    second = said(chat, "And?")
    views = {
        "base": (lm.base, None),
        "tuned": (lm, None),
        "steered": (lm, {SITE: steer.add_direction(V, 1.0).on("response")}),
    }
    for voice, (view, edits) in views.items():
        history = (("user", "Hi"), ("assistant", first[voice]), ("user", "And?"))
        assert second[voice] == alone(view, edits, *history), voice
    assert second["steered"] != second["tuned"]
    assert [turn.edits for turn in chat.turns] == [(), ("add_direction evil=1 on response",)]


def test_pieces_grow_until_all_voices_are_done(chat):
    steps = list(chat.ask("Hi"))
    for before, after in itertools.pairwise(steps):
        assert all(after[voice].startswith(before[voice]) for voice in after)
    assert len(steps) >= 6
    assert chat.turns[-1].answers == steps[-1]


def test_edits_change_while_chatting(lm, chat):
    chat.add_edit("clamp 3=9")
    chat.add_edit("blocks.0.hook_resid_post: project_out evil")
    assert chat.texts == ["clamp 3=9", "blocks.0.hook_resid_post: project_out evil"]
    edited = said(chat, "Hi")["steered"]
    both = {SITE: steer.clamp(make_sae(), 3, 9.0), Site(0): steer.project_out(V)}
    assert edited == alone(lm, both, ("user", "Hi"))
    assert chat.drop_edit(1) == "clamp 3=9"
    *_, again = chat.retry()
    assert again["steered"] == alone(lm, {Site(0): steer.project_out(V)}, ("user", "Hi"))
    chat.texts.clear()
    *_, plain = chat.retry()
    assert plain["steered"] == plain["tuned"] == alone(lm, None, ("user", "Hi"))
    for wrong, message in (("clmp 3=1", "expected one of add"), ("clamp 99=1", "latents: expected")):
        with pytest.raises(InputError, match=message):
            chat.add_edit(wrong)
    with pytest.raises(InputError, match="number: expected 1 to 0, received 1"):
        chat.drop_edit(1)


def test_a_reset_forgets_what_was_said_and_keeps_edits(chat):
    chat.add_edit("clamp 3=9")
    first = said(chat, "Hi")
    chat.reset()
    assert chat.texts == ["clamp 3=9"]
    assert said(chat, "Hi") == first
    chat.reset()
    with pytest.raises(InputError, match="retry: expected a question before it"):
        chat.retry()


def test_an_answer_that_is_cut_short_is_kept_as_far_as_it_came(chat):
    answers = chat.ask("Hi")
    for _ in range(3):
        part = next(answers)
    answers.close()
    assert chat.turns[-1].answers == part
    assert said(chat, "And?")


def test_settings_change_and_are_checked(chat):
    assert chat.change("temperature", "1.5").temperature == 1.5
    assert chat.change("max_new_tokens", "3").max_new_tokens == 3
    said(chat, "Hi")
    assert chat.turns[-1].config.max_new_tokens == 3
    first = said(chat, "Hi")
    *_, again = chat.retry()
    assert again == first  # as if it had not been asked
    assert [turn.config.seed for turn in chat.turns] == [0, 1, 1]
    assert said(chat, "Hi") != first
    for name, value, message in (
        ("top_p", "0", "top_p: expected more than 0"),
        ("seed", "x", "seed: expected a number, received 'x'"),
        ("system", "x", "name: expected one of max_new_tokens"),
    ):
        with pytest.raises(InputError, match=message):
            chat.change(name, value)
    assert chat.config.top_p == 1.0


def test_what_is_given_from_the_start_is_checked(lm):
    sources = {"sae": make_sae(), "site": SITE}
    with Engine({"base": lm.base}) as engine, pytest.raises(InputError, match="latents: expected"):
        Chat(engine, "base", sources, texts=["clamp 99=1"])
    with Engine({"steered": lm.base}) as engine, pytest.raises(InputError, match="another name than 'steered'"):
        Chat(engine, "steered", sources)
    with pytest.raises(InputError, match="temperature: expected 0 or more"):
        ChatConfig(temperature=-1.0)


def test_an_edit_keeps_its_site_where_there_is_no_other(lm):
    with Engine({"base": lm.base}) as engine:
        chat = Chat(engine, "base", {"directions": {"evil": {SITE: V}}}, CONFIG)
        text = "blocks.1.hook_resid_post: project_out evil"
        assert chat.add_edit(text) == text
        assert said(chat, "Hi")["steered"] == alone(lm.base, {SITE: steer.project_out(V)}, ("user", "Hi"))


def test_a_question_that_does_not_fit_is_as_if_it_had_not_been_asked(lm, chat):
    first = said(chat, "Hi")
    chat.change("max_new_tokens", str(10**6))
    for refused in (lambda: chat.ask("And?"), chat.retry, chat.retry):
        with pytest.raises(InputError, match="max_new_tokens, with the prompt"):
            refused()
    assert len(chat.turns) == 1
    chat.change("max_new_tokens", "6")
    second = said(chat, "And?")
    history = (("user", "Hi"), ("assistant", first["base"]), ("user", "And?"))
    assert second["base"] == alone(lm.base, None, *history)


def test_a_voice_that_breaks_lets_the_others_finish(lm, chat):
    expected = said(chat, "Hi")
    chat.reset()
    chat.add_edit("add_direction evil=1e39")
    with pytest.raises(NonFiniteError, match="lower the strength"):
        said(chat, "Hi")
    assert chat.turns[-1].answers == {**expected, "steered": ""}
    assert chat._histories["steered"] == [Message("system", "Be brief.")]
    assert len(chat._histories["base"]) == 3


def test_transcripts(chat, tmp_path):
    chat.add_edit("clamp 3=9")
    said(chat, "Hi\nthere")
    said(chat, "And?")
    lines = save_transcript(chat.turns, tmp_path / "new" / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["question"] for row in rows] == ["Hi\nthere", "And?"]
    assert rows[1]["answers"] == dict(chat.turns[1].answers)
    assert rows[1]["edits"] == ["clamp 3=9"]
    assert rows[1]["config"]["temperature"] == 0.0
    text = save_transcript(chat.turns, tmp_path / "chat.md").read_text(encoding="utf-8")
    assert text.startswith("## Hi there\n\nEdits: `clamp 3=9`\n\n**base**\n\n> ")
    assert "**steered**" in text
    unsafe = Turn("<script>alert(1)</script>", {"base": "<img src=x onerror=alert(1)> [a](b)"}, (), CONFIG)
    text = save_transcript([unsafe], tmp_path / "chat.md").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img" not in text
    assert "[a](b)" not in text
