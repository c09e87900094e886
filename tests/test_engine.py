"""The engine: many requests at a time, none of which sees another's edits, adapter or random numbers."""

import threading

import pytest
import torch
from tiny_sae import make_sae, with_random_adapter

from saetools import Conversation, SamplingConfig, Site, generate, steer
from saetools.engine import BusyError, Engine, Growing, Piece, Request, Stream, settled
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
    model = "tuned" if number % 2 else "base"
    settings = {"max_new_tokens": 5 + number % 7, "temperature": 0.0, "model": model, "edits": EDITS[number % 4]}
    return Request(Conversation.chat(f"Question {number}?"), **{**settings, **changes})


def engine_of(lm, **settings):
    return Engine({"base": lm.base, "tuned": lm}, **settings)


def test_eight_clients_get_the_answers_they_would_get_alone(lm):
    n_each, found = 6, {}
    with engine_of(lm, max_rows=10) as engine:

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
        view = lm.base if one.model == "base" else lm
        config = SamplingConfig(one.max_new_tokens, temperature=0.0)
        (alone,) = generate(view, [one.prompt], variants={"x": one.edits}, config=config)
        assert found[number] == alone.text, number
    assert len(set(found.values())) > 20


def test_pieces_make_the_answer_and_the_last_says_why(lm):
    with engine_of(lm) as engine:
        stream = engine.submit(request(2, max_new_tokens=7, n_top=2))
        pieces = list(stream)
    assert [piece.reason for piece in pieces] == [None] * 6 + ["length"]
    assert all(len(piece.token_ids) == len(piece.log_probs) == len(piece.top) == 1 for piece in pieces)
    ids = [piece.token_ids[0] for piece in pieces]
    assert "".join(piece.text for piece in pieces) == lm.tokenizer.decode(ids, skip_special_tokens=True)
    assert all(piece.top[0][0][0] == piece.token_ids[0] for piece in pieces)
    assert stream.n_prompt_tokens > 5


def test_seeds_make_answers(lm):
    with engine_of(lm) as engine:
        texts = [engine.submit(request(0, temperature=1.0, seed=seed)).text() for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(lm):
    with engine_of(lm) as engine:
        whole = engine.submit(request(0, max_new_tokens=12)).text()
        stop = whole[4:6]
        pieces = list(engine.submit(request(0, max_new_tokens=12, stop=("never", stop))))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].reason == "stop"


def test_plain_texts_are_continued(lm):
    with engine_of(lm) as engine:
        prompt = Conversation(text="Once upon a")
        text = engine.submit(Request(prompt, "base", max_new_tokens=4, temperature=0.0)).text()
        with pytest.raises(InputError, match="expected text that has tokens"):
            engine.submit(Request(Conversation(text=""), "base"))
    ids = lm.tokenizer("Once upon a", return_tensors="pt").input_ids
    with torch.no_grad(), lm.base.active() as model:
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert text == lm.tokenizer.decode(expected, skip_special_tokens=True)


def test_a_request_that_fails_fails_alone(lm):
    def wrong(acts, where):
        return acts[:, :, :3]

    def late(acts, where):
        return acts * torch.where((where.steps == 2)[..., None], torch.inf, 1.0)

    with engine_of(lm) as engine:
        streams = [engine.submit(request(number, model="base")) for number in range(3)]
        bad = engine.submit(request(0, edits={SITE: wrong}))
        infinite = engine.submit(request(0, edits={SITE: late}))
        expected = [engine.submit(request(number, model="base")).text() for number in range(3)]
        assert [stream.text() for stream in streams] == expected
        with pytest.raises(InputError, match="an edit that returns activations of shape"):
            bad.text()
        with pytest.raises(NonFiniteError, match="lower the strength"):
            infinite.text()
        assert engine.submit(request(0)).text() == expected[0]


def test_a_cancelled_request_makes_room(lm):
    with engine_of(lm, max_rows=1) as engine:
        endless = engine.submit(request(0, max_new_tokens=100))
        pieces = iter(endless)
        next(pieces)
        waiting = engine.submit(request(1))
        waiting.cancel()
        endless.cancel()
        assert len(list(pieces)) < 99
        assert list(waiting) == []  # it was never begun
        assert engine.submit(request(2)).text()
        assert [len(lane.rows) for lane in engine._lanes.values()] == [0, 0]


def test_too_many_requests_are_refused(lm):
    with engine_of(lm, max_rows=1, max_waiting=2) as engine:
        streams = [engine.submit(request(0, max_new_tokens=100))]
        next(iter(streams[0]))  # it is being answered
        streams += [engine.submit(request(number)) for number in (1, 2)]
        with pytest.raises(BusyError, match="2 requests wait already"):
            engine.submit(request(3))
        streams[0].cancel()
        assert all(stream.text() for stream in streams[1:])


def test_an_engine_that_breaks_tells_everyone(lm, monkeypatch):
    engine = engine_of(lm, max_rows=1)
    streams = [engine.submit(request(0, max_new_tokens=100)) for _ in range(2)]
    monkeypatch.setattr(engine._lanes["base"], "drop", lambda rows: 1 / 0)
    for stream in streams:
        with pytest.raises(ZeroDivisionError):
            stream.text()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.submit(request(0))


def test_a_prompt_that_cannot_be_joined_leaves_the_others_as_they_are(lm, monkeypatch):
    """Reading succeeds, and joining fails for once: nobody has lost or gained a token when it is tried again."""
    from saetools import decoding

    real, calls = decoding.merged, []

    def fails_once(caches):
        calls.append(len(caches))
        if len(calls) == 1:
            raise MemoryError
        return real(caches)

    with engine_of(lm) as engine:
        expected = [engine.submit(request(number, model="base")).text() for number in (1, 2)]
    monkeypatch.setattr(decoding, "merged", fails_once)
    begun, both_wait = threading.Event(), threading.Event()

    def holds_the_engine_up(piece):
        begun.set()
        both_wait.wait(60)

    with engine_of(lm) as engine:
        first = engine.submit(request(0, model="base", max_new_tokens=60), sink=holds_the_engine_up)
        assert begun.wait(60)
        later = [engine.submit(request(number, model="base")) for number in (1, 2)]
        both_wait.set()
        assert [stream.text() for stream in later] == expected
        first.cancel()
    assert len(calls) == 3  # together, then one by one


def test_pieces_can_be_taken_by_a_function(lm):
    taken = []
    done = threading.Event()

    def take(piece):
        taken.append(piece)
        if piece is None:
            done.set()

    with engine_of(lm) as engine:
        engine.submit(request(0), sink=take)
        assert done.wait(60)
        expected = engine.submit(request(0)).text()
    assert "".join(piece.text for piece in taken[:-1]) == expected


def test_two_models_of_their_own_answer_side_by_side(make_tiny):
    one, other = make_tiny("llama"), make_tiny("gpt2")
    with Engine({"one": one, "other": other}) as engine:
        streams = {name: engine.submit(request(0, model=name, edits=None)) for name in ("one", "other")}
        texts = {name: stream.text() for name, stream in streams.items()}
    for name, lm in (("one", one), ("other", other)):
        (alone,) = generate(lm, [request(0).prompt], config=SamplingConfig(5, temperature=0.0))
        assert texts[name] == alone.text


def test_a_closed_engine_tells_those_who_wait(lm):
    engine = engine_of(lm, max_rows=1)
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
    with engine_of(lm) as engine:
        for settings, message in (
            ({"model": "nobody"}, "model: expected one of base, tuned, received 'nobody'"),
            ({"edits": {Site(9): steer.project_out(V)}}, "site: expected a layer below 3"),
            ({"max_new_tokens": 10**6}, "max_new_tokens, with the prompt: expected at most"),
        ):
            with pytest.raises(InputError, match=message):
                engine.submit(request(0, **settings))


def test_engines_need_models_and_room(lm, make_tiny):
    for settings, message in (
        ({"max_rows": 0}, "max_rows: expected 1"),
        ({"max_waiting": 0}, "max_waiting: expected 1"),
    ):
        with pytest.raises(InputError, match=message):
            engine_of(lm, **settings)
    with pytest.raises(InputError, match="models: expected one or more"):
        Engine({})
    with engine_of(lm) as engine:
        prompt = request(0).prompt
        assert engine.room("base", prompt) == lm.n_context - engine.submit(request(0)).n_prompt_tokens


def test_what_may_still_change_is_held_back(smollm):
    assert settled("He said EN", ("END", "NO")) == "He said "
    assert settled("He said N", ("END", "NO")) == "He said "
    assert settled("He said", ("END",)) == "He said"
    text = "Naïve \U0001f600 日本 - it's  fine.\n  So"
    ids = smollm.tokenizer(text).input_ids
    growing, shown = Growing(smollm.tokenizer, ()), ""
    for n in range(1, len(ids) + 1):
        new, stopped = growing.grow(ids[:n], is_done=n == len(ids))
        assert "\ufffd" not in new
        assert not stopped
        shown += new
    assert shown == text
    growing, shown = Growing(smollm.tokenizer, ("fine",)), ""
    for n in range(1, len(ids) + 1):
        new, stopped = growing.grow(ids[:n], is_done=False)
        shown += new
        if stopped:
            break
    assert shown == text[: text.index("fine")]


def test_a_cancelled_stream_ends():
    stream = Stream(3)
    stream.tell(Piece("a", (1,)))
    stream.cancel()
    assert [piece.text for piece in stream] == ["a"]
    assert stream.is_cancelled


def test_something_else_runs_between_tokens(lm):
    """On the engine's thread, while answers go on; what it raises is raised where it was asked for."""
    with engine_of(lm) as engine:
        expected = engine.submit(request(0, model="base", max_new_tokens=40)).text()
        stream = engine.submit(request(0, model="base", max_new_tokens=40))
        pieces = [next(iter(stream)).text]
        assert engine.between(lambda: threading.current_thread().name) == "saetools-engine"
        with pytest.raises(ZeroDivisionError):
            engine.between(lambda: 1 / 0)
        pieces += [piece.text for piece in stream]
        assert "".join(pieces) == expected
    with pytest.raises(RuntimeError, match="closed"):
        engine.between(lambda: None)
