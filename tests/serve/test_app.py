"""The application by itself, on tiny models: bounds, shapes of answers, errors within a stream, starting again."""

import json

import pytest
import torch
from fastapi.testclient import TestClient

from saetools import Site
from saetools.errors import InputError
from saetools.serve.app import ServerConfig, make_app

V = torch.randn(32, generator=torch.Generator().manual_seed(2))
LOCAL = ServerConfig(hosts=("testserver",), max_new_tokens=50)


@pytest.fixture(scope="module")
def lm(make_tiny):
    return make_tiny("gpt2")


@pytest.fixture(scope="module")
def app(lm):
    return make_app({"tiny": lm}, directions={"v": {Site(1): V}}, site=Site(1), config=LOCAL)


@pytest.fixture
def client(app):
    with TestClient(app) as found:  # each starts and stops the engine
        yield found


def complete(client, **body):
    response = client.post("/v1/completions", json={"model": "tiny", "temperature": 0, **body})
    return response.status_code, response.json()


def test_without_a_length_the_rest_of_the_context_is_the_bound(client, lm):
    for n_prompt, n_new in ((10, 50), (100, 28)):
        messages = [{"role": "user", "content": "x" * n_prompt}]
        body = {"model": "tiny", "messages": messages, "temperature": 0}
        found = client.post("/v1/chat/completions", json=body).json()
        used = found["usage"]
        if found["choices"][0]["finish_reason"] == "length":
            assert used["completion_tokens"] == min(50, lm.n_context - used["prompt_tokens"])
        assert used["completion_tokens"] <= n_new
    status, body = complete(client, prompt="x" * 200)
    assert (status, body["error"]["param"]) == (400, "max_tokens")
    assert "at most 0, what the prompt leaves" in body["error"]["message"]


def test_log_probabilities_of_plain_texts_have_their_places(client):
    _, body = complete(client, prompt="Hi", max_tokens=5, logprobs=2)
    found = body["choices"][0]["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == 5
    assert found["text_offset"] == [sum(map(len, found["tokens"][:n])) for n in range(5)]
    for token, value, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[token] == value == max(top.values())


def test_bytes_of_half_a_character_are_not_made_up(client):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "max_tokens": 20}
    content = client.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    for one in content:
        assert one["bytes"] == (None if "\ufffd" in one["token"] else list(one["token"].encode()))


def test_an_error_in_a_stream_is_an_event(client):
    body = {"model": "tiny", "prompt": "Hi", "edits": ["add_direction v=1e39 on generated"], "stream": True}
    lines = client.post("/v1/completions", json=body).text.splitlines()
    events = [line.removeprefix("data: ") for line in lines if line]
    assert "not finite" in json.loads(events[-1])["error"]["message"]
    assert "[DONE]" not in events


def test_choices_differ_and_come_again(client):
    found = [
        [choice["text"] for choice in complete(client, prompt="Hi", n=3, temperature=1, seed=seed)[1]["choices"]]
        for seed in (1, 1, 2)
    ]
    assert found[0] == found[1]
    assert len({*found[0], *found[2]}) == 6  # no choice of one seed is that of the next


def test_an_app_can_be_started_again(app):
    for _ in range(2):
        with TestClient(app) as client:
            assert complete(client, prompt="Hi", max_tokens=2)[0] == 200


def test_too_many_requests_are_told_so(lm):
    app = make_app({"tiny": lm}, config=ServerConfig(("testserver",), max_rows=1, max_waiting=1))
    with TestClient(app) as client:
        status, body = complete(client, prompt="Hi", n=4, max_tokens=40)
    assert (status, body["error"]["type"]) == (429, "rate_limit_error")


def test_settings_are_checked(lm, make_tiny):
    for settings, message in (
        ({"max_rows": 0}, "max_rows: expected 1 or more"),
        ({"hosts": ("*",)}, "hosts: expected names, where no key is asked for"),
    ):
        with pytest.raises(InputError, match=message):
            ServerConfig(**settings)
    with pytest.raises(InputError, match="models: expected Hugging Face models, received none"):
        make_app({})
