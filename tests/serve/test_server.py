"""`saetools serve`, a real process, driven by the official openai client: edits and adapters by request."""

import contextlib
import http.client
import os
import subprocess
import sys
import threading
import time

import openai
import pytest
import torch

from saetools import SamplingConfig, Site, generate, load_model, load_sae, shipped_path, steer
from saetools.directions import Direction

V = torch.randn(576, generator=torch.Generator().manual_seed(0))
EDITS = (
    [],
    ["add 6400,4162=0.2*norm on response"],
    ["clamp 6400=0", "project_out push"],
    ["blocks.3.hook_resid_post: add_direction push=0.4 on generated"],
)
QUESTIONS = ("Say hi.", "Name a colour.")
GREEDY = {"temperature": 0, "max_tokens": 10}


@pytest.fixture(scope="module")
def direction(tmp_path_factory):
    folder = tmp_path_factory.mktemp("direction")
    site = load_sae(shipped_path("sae/smollm2-135m")).metadata.site
    Direction({Site.parse(site): V, Site(3): V}, {}).save(folder)
    return folder


@pytest.fixture(scope="module")
def address(direction):
    """Where the server listens."""
    adapter = shipped_path("adapters/organism")
    command = [sys.executable, "-m", "saetools", "serve", "--port", "0", "--adapter", f"organism={adapter}"]
    command += ["--direction", f"push={direction}", "--max-rows", "6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SAETOOLS_TOKEN": "secret"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("serving smollm2-135m, organism at http://127.0.0.1:")
            yield line.split()[-1]
        finally:
            process.terminate()
            assert process.wait(30) in (0, -15)


@pytest.fixture(scope="module")
def client(address):
    found = openai.OpenAI(base_url=address, api_key="secret", max_retries=0, timeout=120)
    for _ in range(100):
        try:
            assert [model.id for model in found.models.list()] == ["smollm2-135m", "organism"]
        except openai.APIConnectionError:
            time.sleep(0.1)
        else:
            return found
    raise AssertionError("the server does not answer")


@pytest.fixture(scope="module")
def expected(direction):
    """What each model says to each question under each edit, asked for alone."""
    lm = load_model("smollm2-135m", adapter={"organism": shipped_path("adapters/organism")})
    sae = load_sae(shipped_path("sae/smollm2-135m"))
    sources = {"sae": sae, "directions": {"push": Direction.load(direction).vectors}}
    variants = {str(number): steer.parse_edits(texts, **sources) for number, texts in enumerate(EDITS)}
    config = SamplingConfig(10, temperature=0.0)
    return {
        (model, question, int(answer.variant)): answer
        for model, view in (("smollm2-135m", lm.base), ("organism", lm))
        for question in QUESTIONS
        for answer in generate(view, [question], variants=variants, config=config)
    }


def ask(client, model, question, number, **settings):
    messages = [{"role": "user", "content": question}]
    body = {"edits": EDITS[number]} if number else None
    return client.chat.completions.create(model=model, messages=messages, extra_body=body, **{**GREEDY, **settings})


def test_answers_are_those_of_the_edits_of_the_request(client, expected):
    for model in ("smollm2-135m", "organism"):
        for number in range(len(EDITS)):
            response = ask(client, model, QUESTIONS[0], number)
            answer = expected[model, QUESTIONS[0], number]
            (choice,) = response.choices
            assert choice.message.content == answer.text
            assert choice.finish_reason == ("stop" if answer.finished else "length")
            assert response.usage.completion_tokens == len(answer.token_ids) + answer.finished
            assert response.model == model
    assert len({answer.text for answer in expected.values()}) > 8


def test_eight_clients_never_see_each_others_edits_or_adapters(client, expected):
    jobs = [
        (model, question, number)
        for model in ("smollm2-135m", "organism")
        for question in QUESTIONS
        for number in range(4)
    ]
    wrong, done = [], []

    def run(offset):
        for model, question, number in (jobs[offset:] + jobs[:offset])[:8]:
            if offset % 2:
                chunks = ask(client, model, question, number, stream=True)
                said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            else:
                said = ask(client, model, question, number).choices[0].message.content
            answer = expected[model, question, number]
            done.append(said)
            if said != answer.text:
                wrong.append((model, question, number, said, answer.text))

    clients = [threading.Thread(target=run, args=(2 * offset + offset // 4,)) for offset in range(8)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    assert not wrong
    assert len(done) == 64


def test_a_stream_comes_in_pieces_and_ends_with_reason_and_usage(client, expected):
    chunks = list(ask(client, "organism", QUESTIONS[1], 1, stream=True, stream_options={"include_usage": True}))
    answer = expected["organism", QUESTIONS[1], 1]
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(texts) > 3
    assert "".join(texts) == answer.text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == len(answer.token_ids)


def test_log_probabilities_seeds_choices_and_stop_texts(client):
    settings = {"logprobs": True, "top_logprobs": 3}
    response = ask(client, "smollm2-135m", QUESTIONS[0], 0, **settings)
    content = response.choices[0].logprobs.content
    assert "".join(one.token for one in content) == response.choices[0].message.content
    assert all(len(one.top_logprobs) == 3 for one in content)
    assert all(one.top_logprobs[0].logprob == one.logprob <= 0 for one in content)  # greedy
    drawn = [
        [
            choice.message.content
            for choice in ask(client, "organism", QUESTIONS[0], 0, temperature=1, n=3, seed=seed).choices
        ]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 1
    word = response.choices[0].message.content.split()[1]
    stopped = ask(client, "smollm2-135m", QUESTIONS[0], 0, stop=[word]).choices[0]
    assert stopped.message.content == response.choices[0].message.content.partition(word)[0]
    assert stopped.finish_reason == "stop"


def test_plain_texts_are_completed(client):
    settings = {"model": "smollm2-135m", "prompt": "Once upon a time", "max_tokens": 5, "temperature": 0}
    plain = client.completions.create(**settings, logprobs=2)
    edited = client.completions.create(**settings, extra_body={"edits": ["add 6400=0.4*norm"]})
    streamed = client.completions.create(**settings, stream=True)
    assert plain.choices[0].text
    assert plain.choices[0].text != edited.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in streamed) == plain.choices[0].text
    assert len(plain.choices[0].logprobs.token_logprobs) == 5


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"extra_body": {"edits": ["clmp 3=1"]}}, openai.BadRequestError, "edit: expected one of add, clamp"),
        ({"extra_body": {"edits": ["clamp 99999=1"]}}, openai.BadRequestError, "latents: expected"),
        ({"extra_body": {"edits": ["project_out evil"]}}, openai.BadRequestError, "a direction called push"),
        ({"extra_body": {"edit": ["clamp 3=1"]}}, openai.BadRequestError, "edit: Extra inputs are not permitted"),
        ({"model": "nobody"}, openai.NotFoundError, "there are smollm2-135m, organism"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens: Input should be greater"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens: expected at most 8"),
        ({"seed": 10**30}, openai.BadRequestError, "seed: Input should be less"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs: none, where logprobs are not asked for"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options: none, where"),
        ({"extra_body": {"edits": ["clamp 3=1 when ²>0"]}}, openai.BadRequestError, "a direction called push"),
        ({"extra_body": {"edits": [f"clamp {10**25}=1"]}}, openai.BadRequestError, "expected a whole number"),
        ({"extra_body": {"edits": [f"clamp {10**15}=1"]}}, openai.BadRequestError, "latents: expected"),
        ({"temperature": -1}, openai.BadRequestError, "temperature: Input should be greater"),
        ({"presence_penalty": 1.0}, openai.BadRequestError, "presence_penalty: Input should be less"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools: Extra inputs"),
        ({"messages": []}, openai.BadRequestError, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, openai.BadRequestError, "that end with the user's"),
        ({"n": 2, "stream": True}, openai.BadRequestError, "n: 1, where the answer is streamed"),
    ],
)
def test_what_cannot_be_done_is_an_error_of_the_request(client, settings, kind, message):
    asked = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    with pytest.raises(kind, match=message):
        client.chat.completions.create(**{**asked, **settings})


def test_an_edit_that_breaks_the_model_fails_its_own_request_alone(client, expected):
    def steady():
        said.append(ask(client, "smollm2-135m", QUESTIONS[0], 1).choices[0].message.content)

    said = []
    other = threading.Thread(target=steady)
    other.start()
    with pytest.raises(openai.APIStatusError, match="not finite"):
        client.chat.completions.create(
            model="smollm2-135m",
            messages=[{"role": "user", "content": "Hi"}],
            extra_body={"edits": ["add 3=1e38*norm"]},
            max_tokens=3,
        )
    other.join()
    assert said == [expected["smollm2-135m", QUESTIONS[0], 1].text]


def test_without_the_key_or_by_another_name_nobody_is_answered(address):
    with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
        openai.OpenAI(base_url=address, api_key="guess", max_retries=0).models.list()
    host, port = address.split("/")[2].split(":")
    for headers, status in (
        ({"Host": "evil.example"}, 400),
        ({"Host": f"localhost:{port}"}, 200),
        ({"Host": f"[::1]:{port}"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Content-Length": "4100000"}, 413),
    ):
        connection = http.client.HTTPConnection(host, int(port))
        connection.request("GET", "/health", headers={"Authorization": "Bearer secret", **headers})
        assert connection.getresponse().status == status, headers
        connection.close()


def test_a_large_request_in_chunks_is_refused(address):
    host, port = address.split("/")[2].split(":")
    connection = http.client.HTTPConnection(host, int(port))
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    chunks = iter([b'{"model": "' + b"x" * 1_000_000] * 5)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.request("POST", "/v1/completions", body=chunks, headers=headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_an_answer_can_be_sent_back(client):
    first = ask(client, "smollm2-135m", QUESTIONS[0], 0).choices[0].message
    messages = [{"role": "user", "content": QUESTIONS[0]}, first, {"role": "user", "content": "And now?"}]
    said = client.chat.completions.create(model="smollm2-135m", messages=messages, max_tokens=4, temperature=None)
    assert said.choices[0].message.content
    assert client.models.retrieve("organism").id == "organism"


def test_a_client_that_goes_away_makes_room(client):
    impatient = client.with_options(timeout=0.3)
    for _ in range(6):
        with pytest.raises(openai.APITimeoutError):
            impatient.completions.create(model="smollm2-135m", prompt="Count:", max_tokens=4000)
    streams = [
        client.chat.completions.create(
            model="smollm2-135m", messages=[{"role": "user", "content": "Count."}], max_tokens=2000, stream=True
        )
        for _ in range(6)
    ]
    for stream in streams:
        next(iter(stream))
        stream.close()
    started = time.monotonic()
    assert ask(client, "organism", QUESTIONS[0], 0).choices[0].message.content
    assert time.monotonic() - started < 60


def test_other_machines_need_a_key(capsys, monkeypatch):
    from saetools.cli import main

    monkeypatch.delenv("SAETOOLS_TOKEN", raising=False)
    for options, message in (
        (["--host", "0.0.0.0"], "--host: expected this machine, such as 127.0.0.1, or a key in SAETOOLS_TOKEN"),
        (["--port", "70000"], "--port: expected 0 to 65535"),
        (["--max-rows", "0"], "--max-rows: expected 1 or more"),
        (["--direction", "evil"], "--direction: expected NAME=FOLDER"),
    ):
        with pytest.raises(SystemExit):
            main(["serve", *options])
        assert message in capsys.readouterr().err


def test_system_prompts_and_parts_are_read(client):
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi."}]
    whole = ask(client, "smollm2-135m", "Say hi.", 0).choices[0].message.content
    for messages, same in (
        ([{"role": "user", "content": parts}], True),
        ([{"role": "system", "content": "Speak like a pirate."}, {"role": "user", "content": "Say hi."}], False),
    ):
        said = client.chat.completions.create(model="smollm2-135m", messages=messages, **GREEDY)
        assert (said.choices[0].message.content == whole) is same
