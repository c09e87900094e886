"""Explanations by a real server: `transformers serve` with the built-in model, over the official client."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from lava import lava_passages

from saetools.data import Message
from saetools.endpoint import AnswerError, Budget, Endpoint, Reply, Spending
from saetools.errors import SaetoolsWarning
from saetools.interpret import ExplainConfig, explain_latents, load_explanations
from saetools.interpret.asking import answering
from saetools.interpret.evidence import split_evidence
from saetools.interpret.explaining import explain_evidence
from saetools.models.builtin import fetch_builtin


@pytest.fixture(scope="module")
def served():
    """Address of the server and name of the model."""
    folder = str(fetch_builtin("smollm2-135m"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    single = {**os.environ, "OMP_NUM_THREADS": "1"}  # as all tests; more would wait for each other
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=single) as process:
        try:
            _wait_until_healthy(process, port)
            yield f"http://127.0.0.1:{port}/v1", folder
        finally:
            process.kill()


def _wait_until_healthy(process, port):
    for _ in range(600):
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError("the server did not start")


def test_a_served_model_answers(served):
    reply = Endpoint(*served, max_retries=0).chat([Message("user", "Say hi.")], max_tokens=8)
    assert reply.text.startswith("Hello")
    assert reply.cut_off
    assert reply.n_tokens > 8


def test_a_slow_answer_is_given_up(served):
    """The client goes away, and the server still answers the next one."""
    impatient = Endpoint(*served, timeout=0.05, max_retries=1)
    with pytest.raises(AnswerError, match=r"no answer within 0.05 s \(after 2 requests\)"):
        impatient.chat([Message("user", "Count to ten.")], max_tokens=16)
    assert Endpoint(*served).chat([Message("user", "Say hi.")], max_tokens=4).text


def test_a_served_model_explains_or_its_failures_are_counted(served, tmp_path):
    """The model is too weak to be right; what it says is read, or missing for a reason, and never made up."""
    config = ExplainConfig(n_shown=2, n_scored=2, n_per_request=2, max_attempts=2, max_tokens=16)
    endpoint = Endpoint(*served, max_concurrent=2, max_retries=0)
    with pytest.warns(SaetoolsWarning, match="of 2 latents"):
        run = explain_latents(
            [3, 5],
            lambda latent: lava_passages(6, n_tokens=6, seed=latent),
            endpoint,
            config=config,
            log=tmp_path / "log",
            budget=Budget(max_requests=30, max_tokens=100_000),
        )
    assert run.unfinished == ()
    assert 2 <= run.n_requests <= 20
    assert run.n_tokens > 100 * run.n_requests
    for one in run.explanations:
        assert (one.text is None) == ("explain" in [failure.step for failure in one.failures])
        assert all(failure.reason.startswith("malformed in 2 attempts") for failure in one.failures)
    assert load_explanations(tmp_path / "log") == list(run.explanations)


def test_a_served_model_judges_or_its_failures_are_counted(served):
    """As above, with an explanation that is not its own, so that it comes to judging."""
    config = ExplainConfig(n_scored=2, n_per_request=2, max_attempts=1, max_tokens=8)
    evidence = split_evidence(lava_passages(6, n_tokens=6), n_shown=2, n_scored=2)
    answers = []
    with answering(Endpoint(*served, max_retries=0), Spending(Budget())) as ask:

        def told(prompt, max_tokens, attempt):
            if '{"explanation": "..."}' in prompt:
                return Reply('{"explanation": "the word lava"}', False, None)
            answers.append(ask(prompt, max_tokens, attempt))
            return answers[-1]

        outcome = explain_evidence(3, evidence, told, acts_of=None, config=config)
    assert outcome.text == "the word lava"
    assert len(answers) == 3  # of 4 passages for detection, and 2 for fuzzing, 2 at a time
    assert all(answer.text for answer in answers)
    for step, score, n in (("detection", outcome.detection, 4), ("fuzzing", outcome.fuzzing, 2)):
        n_missing = sum(failure.n_passages for failure in outcome.failures if failure.step == step)
        assert n_missing == n if score is None else score.n + n_missing == n
