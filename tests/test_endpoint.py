"""An endpoint that behaves well, badly, or as an enemy of the key."""

import email.utils
import threading
import time
import traceback

import pytest
from fake_endpoint import Bad, completion, fake_server

from saetools.data import Message
from saetools.endpoint import (
    AnswerError,
    Budget,
    BudgetSpentError,
    ChatSession,
    Endpoint,
    Spending,
)
from saetools.errors import InputError

HELLO = [Message("user", "Hello?")]
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _without_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def session(server, *, spending=None, **settings):
    settings = {"timeout": 5.0, "max_retries": 2, "api_key": KEY, **settings}
    return ChatSession(Endpoint(server.url, "some-model", **settings), spending=spending)


def ask_recording_waits(open_session):
    """The reply, or the error, and how long each wait before a retry would have been."""
    waits = []
    open_session._closed.wait = lambda seconds: waits.append(seconds)
    try:
        return open_session.ask(HELLO, max_tokens=8), waits
    except AnswerError as error:
        return error, waits


def test_a_question_is_answered():
    with fake_server(lambda *_: "Hello!") as server:
        reply = Endpoint(server.url, "some-model", api_key=KEY).chat(HELLO, max_tokens=8, temperature=0.5)
    assert (reply.text, reply.cut_off, reply.n_tokens) == ("Hello!", False, 10)
    assert server.keys == [KEY]
    assert server.requests == [
        {
            "model": "some-model",
            "messages": [{"role": "user", "content": "Hello?"}],
            "max_tokens": 8,
            "temperature": 0.5,
        }
    ]


def test_fields_of_the_request_can_be_added_and_left_out():
    extra = {"max_tokens": None, "temperature": None, "max_completion_tokens": 9, "reasoning_effort": "low"}
    with fake_server(lambda *_: "Hello!") as server, session(server, request=extra) as one:
        one.ask(HELLO, max_tokens=8)
    (request,) = server.requests
    assert set(request) == {"model", "messages", "max_completion_tokens", "reasoning_effort"}


def test_an_answer_that_was_cut_off_or_is_null_says_so():
    answers = [Bad(body=completion("Hel", finish_reason="length")), Bad(body=completion(None)), "half \ud800"]
    with fake_server(lambda number, _: answers[number]) as server, session(server) as one:
        replies = [one.ask(HELLO, max_tokens=8) for _ in answers]
    assert [reply.cut_off for reply in replies] == [True, False, False]
    assert [reply.text for reply in replies] == ["Hel", "", "half ?"]


PASSING = {
    "rate limit": (Bad(429, '{"error": {"message": "slow down"}}'), "status 429: .*slow down"),
    "server's error": (Bad(500, "<html>boom</html>"), "status 500: <html>boom</html>"),
    "overloaded": (Bad(503), "status 503"),
    "request time-out": (Bad(408), "status 408"),
    "no JSON": (Bad(body="Hello!"), "no chat completion: Hello!"),
    "nothing": (Bad(body=""), "no chat completion: nothing"),
    "no choices": (Bad(body='{"choices": []}'), "no chat completion"),
    "an error as success": (Bad(body='{"error": {"message": "busy"}}'), "no chat completion: .*busy"),
    "content in parts": (Bad(body=completion([{"type": "text"}])), "no chat completion"),
    "half a body": (Bad(body=completion("Hello!"), cut=40), "the answer broke off"),
    "half a JSON": (Bad(body=completion("Hello!")[:30]), "no chat completion"),
    "a list of lists": (Bad(body="[" * 100_000), "no chat completion"),
    "time-out": (Bad(body=completion("Hello!"), delay=1.5), "no answer within 0.3 s"),
    "drip": (Bad(body=completion("Hello!"), drip=0.05), "the answer took longer than the time-out"),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_asked_again(name):
    bad, reason = PASSING[name]
    settings = {"timeout": 0.3} if name in ("time-out", "drip") else {}
    with fake_server(lambda number, _: bad if number < 2 else "Hello!") as server, session(server, **settings) as one:
        reply, waits = ask_recording_waits(one)
    assert reply.text == "Hello!"
    assert len(server.requests) == 3
    assert 0.25 <= waits[0] <= 0.5 <= waits[1] <= 1.0  # doubled, and partly random
    with fake_server(lambda *_: bad) as server, session(server, max_retries=1, **settings) as one:
        error, _ = ask_recording_waits(one)
        assert len(server.requests) == 2
    with pytest.raises(AnswerError, match=rf"(?s){reason}.*\(after 2 requests\)"):
        raise error


def test_no_connection_is_a_reason():
    with fake_server(lambda *_: "") as server:
        pass
    with session(server, max_retries=0) as one, pytest.raises(AnswerError, match=r"no connection \(after 1 request\)"):
        one.ask(HELLO, max_tokens=8)


def test_retry_after_is_waited_for():
    soon = email.utils.formatdate(time.time() + 20, usegmt=True)
    for value, least, most in (
        ("3", 3, 3.5),
        ("0.25", 0.25, 0.75),
        (soon, 15, 20.5),
        ("-1", 0, 0.5),
        ("soon", 0.25, 0.5),
    ):
        limited = Bad(429, headers={"Retry-After": value})
        with fake_server(lambda number, _, bad=limited: "Hello!" if number else bad) as server, session(server) as one:
            reply, waits = ask_recording_waits(one)
        assert reply.text == "Hello!"
        (wait,) = waits
        assert least <= wait <= most


def test_nobody_waits_for_an_hour():
    with fake_server(lambda *_: Bad(429, headers={"Retry-After": "3600"})) as server, session(server) as one:
        error, waits = ask_recording_waits(one)
    assert "after 1 request)" in str(error)
    assert waits == []


def test_a_bad_request_is_not_repeated():
    with (
        fake_server(lambda *_: Bad(400, '{"error": {"message": "too long"}}')) as server,
        session(server) as one,
        pytest.raises(AnswerError, match=r"status 400: .*too long"),
    ):
        one.ask(HELLO, max_tokens=8)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "bad", [Bad(401), Bad(403), Bad(404), Bad(429, '{"error": {"code": "insufficient_quota", "message": "pay"}}')]
)
def test_what_will_not_pass_is_the_callers_to_mend(bad):
    with (
        fake_server(lambda *_: bad) as server,
        session(server) as one,
        pytest.raises(InputError, match=rf"(?s)answers of 'some-model', received status {bad.status}.*check base_url"),
    ):
        one.ask(HELLO, max_tokens=8)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [200, 400, 401, 429, 500])
def test_no_error_shows_the_key(status):
    echo = Bad(status, '{"error": {"message": "your key {key} is no good"}}')
    with fake_server(lambda *_: echo) as server, session(server, max_retries=0) as one:
        with pytest.raises((AnswerError, InputError)) as caught:
            one.ask(HELLO, max_tokens=8)
        assert server.keys == [KEY]
        shown = "".join(traceback.format_exception(caught.value)) + repr(one.endpoint) + str(one.endpoint.describe())
        assert KEY not in shown
        assert "some-model" in shown


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    with fake_server(lambda *_: "Hello!") as server:
        Endpoint(server.url, "m").chat(HELLO, max_tokens=8)
        Endpoint(server.url, "m", api_key="given").chat(HELLO, max_tokens=8)
    assert server.keys == ["from-the-environment", "given"]


def test_addresses_with_passwords_are_refused_without_showing_them():
    for address in ("https://user:pass-1234@host/v1", "https://host/v1?key=pass-1234", "host/v1", "file:///v1"):
        with pytest.raises(InputError, match="base_url") as caught:
            Endpoint(address, "m")
        assert "pass-1234" not in str(caught.value)


@pytest.mark.parametrize("bad", [{"timeout": 0.0}, {"max_retries": -1}, {"max_concurrent": 0}])
def test_bounds_are_checked(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Endpoint("http://host/v1", "m", **bad)


def test_a_budget_of_requests_counts_retries():
    spending = Spending(Budget(max_requests=3))
    with (
        fake_server(lambda number, _: "Hello!" if number == 0 else Bad(500)) as server,
        session(server, spending=spending, max_retries=9) as one,
    ):
        one.ask(HELLO, max_tokens=8)
        one._closed.wait = lambda _: False
        with pytest.raises(BudgetSpentError, match="3 of 3 requests are spent"):
            one.ask(HELLO, max_tokens=8)
    assert len(server.requests) == spending.n_requests == 3


def test_a_budget_of_tokens_ends_the_asking():
    spending = Spending(Budget(max_tokens=15))
    with fake_server(lambda *_: "Hello!") as server, session(server, spending=spending) as one:
        for _ in range(2):  # 10 tokens each
            one.ask(HELLO, max_tokens=8)
        with pytest.raises(BudgetSpentError, match="20 of 15 tokens are spent"):
            one.ask(HELLO, max_tokens=8)
    assert len(server.requests) == 2


def test_tokens_that_nobody_counts_cannot_be_bounded():
    silent = Bad(body=completion("Hello!", usage=False))
    with fake_server(lambda *_: silent) as server:
        with session(server) as one:
            assert one.ask(HELLO, max_tokens=8).n_tokens is None
        with (
            session(server, spending=Spending(Budget(max_tokens=15))) as one,
            pytest.raises(InputError, match="bound requests instead"),
        ):
            one.ask(HELLO, max_tokens=8)


def test_no_more_requests_are_in_flight_than_allowed():
    full = threading.Barrier(2)

    def both_or_none(*_):
        full.wait(timeout=10)  # answers in pairs only: there are two at a time
        return "Hello!"

    with fake_server(both_or_none) as server, session(server, max_concurrent=2) as one:
        threads = [threading.Thread(target=one.ask, args=(HELLO,), kwargs={"max_tokens": 8}) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(server.requests) == 6
    assert server.most_in_flight == 2


def test_closing_ends_the_waiting():
    limited, caught = threading.Event(), []

    def refuse(*_):
        limited.set()
        return Bad(429, headers={"Retry-After": "50"})

    def ask(one):
        try:
            one.ask(HELLO, max_tokens=8)
        except AnswerError as error:
            caught.append(str(error))

    with fake_server(refuse) as server:
        one = session(server)
        thread = threading.Thread(target=ask, args=(one,))
        thread.start()
        assert limited.wait(10)
        one.close()
        thread.join(timeout=20)
    assert not thread.is_alive()
    assert len(caught) == 1
