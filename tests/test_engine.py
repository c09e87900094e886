"""The engine: many requests at a time, none of which sees another's edits, adapter or random numbers."""

import threading

import pytest
import torch
from tiny_sae import make_sae, with_random_adapter

from saetools import Conversation, SamplingConfig, Site, generate, steer
from saetools.engine import Engine, Request, _settled
from saetools.errors import InputError, NonFiniteError

SITE = Site(1)
V = 3 * torch.randn(32, generator=torch.Generator().manual_seed(2))
EDITS = [
    None,
    {SITE: steer.clamp(make_sae(), 3, 9.0).on("response")},
    {SITE: steer.add_direction(V, 1.0)},
    {SITE: steer.project_out(V).on("generated")},
]


@pytest.fixture(scope="module")
def lm(make_tiny):
    return with_random_adapter(make_tiny("llama"))


def request(number, **changes):
    adapter = "tuned" if number % 2 else None
    settings = {"max_new_tokens": 5 + number % 7, "temperature": 0.0, "adapter": adapter, "edits": EDITS[number % 4]}
    return Request(Conversation.chat(f"Question {number}?"), **{**settings, **changes})


def test_eight_clients_get_the_answers_they_would_get_alone(lm):
    n_each, found = 6, {}
    with Engine(lm, max_rows=10) as engine:

        def ask(client):
            for turn in range(n_each):
                number = client + 8 * turn
                found[number] = engine.submit(request(number)).text()

        clients = [threading.Thread(target=ask, args=(client,)) for client in range(8)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    for number in range(8 * n_each):
        one = request(number)
        view = lm.base if one.adapter is None else lm.with_adapter(one.adapter)
        config = SamplingConfig(one.max_new_tokens, temperature=0.0)
        (alone,) = generate(view, [one.prompt], variants={"x": one.edits}, config=config)
        assert found[number] == alone.text, number
    assert len(set(found.values())) > 20


def test_pieces_make_the_answer_and_the_last_says_why(lm):
    with Engine(lm) as engine:
        stream = engine.submit(request(2, max_new_tokens=7, n_top=2))
        pieces = list(stream)
    assert [piece.reason for piece in pieces] == [None] * 6 + ["length"]
    assert all(len(piece.token_ids) == len(piece.log_probs) == len(piece.top) == 1 for piece in pieces)
    ids = [piece.token_ids[0] for piece in pieces]
    assert "".join(piece.text for piece in pieces) == lm.tokenizer.decode(ids, skip_special_tokens=True)
    assert all(piece.top[0][0][0] == piece.token_ids[0] for piece in pieces)
    assert stream.n_prompt_tokens > 5


def test_seeds_make_answers(lm):
    with Engine(lm) as engine:
        texts = [engine.submit(request(0, temperature=1.0, seed=seed)).text() for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(lm):
    with Engine(lm) as engine:
        whole = engine.submit(request(0, max_new_tokens=12)).text()
        stop = whole[4:6]
        pieces = list(engine.submit(request(0, max_new_tokens=12, stop=("never", stop))))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].reason == "stop"


def test_plain_texts_are_continued(lm):
    with Engine(lm) as engine:
        prompt = Conversation(text="Once upon a")
        text = engine.submit(Request(prompt, max_new_tokens=4, temperature=0.0)).text()
        with pytest.raises(InputError, match="expected text that has tokens"):
            engine.submit(Request(Conversation(text="")))
    ids = lm.tokenizer("Once upon a", return_tensors="pt").input_ids
    with torch.no_grad(), lm.base.active() as model:
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert text == lm.tokenizer.decode(expected, skip_special_tokens=True)


def test_a_request_that_fails_fails_alone(lm):
    def wrong(acts, where):
        return acts[:, :, :3]

    def late(acts, where):
        return acts * torch.where((where.steps == 2)[..., None], torch.inf, 1.0)

    with Engine(lm) as engine:
        streams = [engine.submit(request(number, adapter=None)) for number in range(3)]
        bad = engine.submit(request(0, edits={SITE: wrong}))
        infinite = engine.submit(request(0, edits={SITE: late}))
        expected = [engine.submit(request(number, adapter=None)).text() for number in range(3)]
        assert [stream.text() for stream in streams] == expected
        with pytest.raises(InputError, match="an edit that returns activations of shape"):
            bad.text()
        with pytest.raises(NonFiniteError, match="lower the strength"):
            infinite.text()
        assert engine.submit(request(0)).text() == expected[0]


def test_a_cancelled_request_makes_room(lm):
    with Engine(lm, max_rows=1) as engine:
        endless = engine.submit(request(0, max_new_tokens=100))
        pieces = iter(endless)
        next(pieces)
        endless.cancel()
        assert engine.submit(request(2)).text()


def test_a_closed_engine_tells_those_who_wait(lm):
    engine = Engine(lm, max_rows=1)
    streams = [engine.submit(request(0, max_new_tokens=100)) for _ in range(3)]
    engine.close()
    engine.close()
    for stream in streams:
        with pytest.raises(RuntimeError, match="the engine was closed"):
            stream.text()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.submit(request(0))


def test_requests_are_checked_at_once(lm):
    for settings, message in (
        ({"max_new_tokens": 0}, "max_new_tokens: expected 1 or more"),
        ({"temperature": -1.0}, "temperature: expected 0 or more"),
        ({"top_p": 0.0}, "top_p: expected more than 0"),
        ({"stop": ("",)}, "stop: expected texts that are not empty"),
        ({"n_top": -1}, "n_top: expected 0 or more"),
    ):
        with pytest.raises(InputError, match=message):
            request(0, **settings)
    with Engine(lm) as engine:
        for settings, message in (
            ({"adapter": "nobody"}, "name: expected one of the loaded adapters tuned"),
            ({"edits": {Site(9): steer.project_out(V)}}, "site: expected a layer below 3"),
            ({"max_new_tokens": 10**6}, "max_new_tokens, with the prompt: expected at most"),
        ):
            with pytest.raises(InputError, match=message):
                engine.submit(request(0, **settings))


def test_what_may_still_change_is_held_back():
    assert _settled("Hel\ufffd", ()) == "Hel"
    assert _settled("He said EN", ("END", "NO")) == "He said "
    assert _settled("He said N", ("END", "NO")) == "He said "
    assert _settled("He said", ("END",)) == "He said"
