"""Explanations and their scores, by endpoints that know, guess or misbehave, and by a model in this process."""

import json
import threading

import pytest
from fake_endpoint import Bad, completion, fake_server
from lava import guesser, lava_passages, oracle, passage, quoted_passages

from saetools.endpoint import Budget, Endpoint
from saetools.errors import InputError, SaetoolsWarning
from saetools.interpret import (
    ExplainConfig,
    Explanation,
    LatentPassages,
    explain_latents,
    load_explanations,
)

SMALL = ExplainConfig(n_shown=6, n_scored=10)


def explain(
    server, latents=(7,), passages=lambda _: lava_passages(), *, config=SMALL, n_concurrent=1, key="k", **settings
):
    endpoint = Endpoint(server.url, "judge", api_key=key, timeout=5.0, max_retries=1, max_concurrent=n_concurrent)
    return explain_latents(list(latents), passages, endpoint, config=config, **settings)


def test_an_oracle_explains_and_scores_near_one():
    with fake_server(oracle) as server:
        run = explain(server)
    (one,) = run.explanations
    assert (one.latent, one.text, one.model, one.n, one.failures) == (7, "the words lava", "judge", 6, ())
    for score in (one.detection, one.fuzzing):
        assert score.mean == score.high == 1
        assert 0.7 < score.low < 1  # 10 verdicts or 20 do not make certainty
    assert (one.detection.n, one.fuzzing.n) == (20, 10)
    assert run.n_requests == len(server.requests) == 1 + 4 + 2
    assert run.n_tokens == 10 * 7
    assert one.provenance["explainer"] == {"base_url": server.url, "model": "judge", "request": {}}
    assert one.provenance["chance"] == 0.5


def test_a_guesser_scores_near_chance():
    config = ExplainConfig(n_shown=6, n_scored=60)
    with fake_server(guesser) as server:
        (one,) = explain(server, passages=lambda _: lava_passages(120), config=config).explanations
    for score in (one.detection, one.fuzzing):
        assert score.low < 0.5 < score.high
        assert abs(score.mean - 0.5) < 0.2


def test_a_wrong_explanation_scores_at_chance():
    def wrong(number, request):
        answer = json.loads(oracle(number, request))
        return json.dumps({"explanation": "the words granite"} if isinstance(answer, dict) else answer)

    with fake_server(wrong) as server:
        (one,) = explain(server).explanations
    assert one.detection.mean == one.fuzzing.mean == 0.5  # never found, nor wrongly


def test_explainer_and_judge_see_other_documents_and_the_judge_no_marks_it_should_not():
    all_passages = lava_passages()
    with fake_server(oracle) as server:
        explain(server)
    asked = [request["messages"][0]["content"] for request in server.requests]
    shown, detected, fuzzed = (
        [text for prompt in some for text in quoted_passages(prompt)] for some in (asked[:1], asked[1:5], asked[5:])
    )
    plain = {one.text for one in all_passages.active} | {one.text for one in all_passages.inactive}
    bare = [{text.replace("<<", "").replace(">>", "") for text in texts} for texts in (shown, detected, fuzzed)]
    assert all(some <= plain for some in bare)
    assert not bare[0] & bare[1]
    assert bare[2] <= bare[1]
    assert not any("<<" in text for text in detected)
    assert all(text.count("<<") == text.count(">>") == 1 for text in shown + fuzzed)
    assert sum("lava" in text for text in detected) == 10
    assert sum("<< lava>>" in text for text in fuzzed) == 5


MALFORMED = {
    "prose": "I would say that it fires on lava.",
    "wrong length": "[1, 0]",
    "no verdicts": "[2, 3, 1, 0, 1]",
    "text verdicts": '["1", "0", "1", "0", "1"]',
    "several": '[1, 0, 1, 0, 1] or {"explanation": "a"} {"explanation": "b"} [1, 1, 1, 0, 1]',
    "empty": "",
    "null": None,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_answers_are_asked_for_again_and_then_failures(name):
    def at_first(number, request):
        return oracle(number, request) if number % 3 == 2 else MALFORMED[name]

    with fake_server(at_first) as server:
        (one,) = explain(server).explanations
    assert one.text == "the words lava"
    assert one.detection.mean == 1
    assert one.failures == ()
    assert [request["temperature"] for request in server.requests[:3]] == [0.0, 0.7, 0.7]
    with (
        fake_server(lambda *_: MALFORMED[name]) as server,
        pytest.warns(SaetoolsWarning, match="1 have no explanation"),
    ):
        (one,) = explain(server).explanations
    assert len(server.requests) == 3
    assert (one.text, one.detection, one.fuzzing) == (None, None, None)
    (failure,) = one.failures
    assert (failure.step, failure.n_passages) == ("explain", 6)
    assert failure.reason.startswith("malformed in 3 attempts, the last time ")


def test_prose_and_fences_around_an_answer_do_no_harm():
    def chatty(number, request):
        return f"<think>[1] or [0]?</think>Sure {{I hope}}:\n```json\n{oracle(number, request)}\n```\nAnything [else]?"

    with fake_server(chatty) as server:
        (one,) = explain(server).explanations
    assert (one.text, one.detection.mean, one.failures) == ("the words lava", 1, ())


def test_batches_without_verdicts_are_counted_and_not_guessed():
    def without_second(number, request):
        return Bad(500) if number in (2, 3) else oracle(number, request)

    with fake_server(without_second) as server, pytest.warns(SaetoolsWarning, match="1 are scored on fewer passages"):
        (one,) = explain(server).explanations
    assert one.detection.mean == 1
    assert one.detection.n == 15
    (failure,) = one.failures
    assert (failure.step, failure.n_passages) == ("detection", 5)
    assert "status 500" in failure.reason


def test_answers_that_are_cut_off_say_so():
    cut = Bad(body=completion('{"explanation": "the w', finish_reason="length"))
    with fake_server(lambda *_: cut) as server, pytest.warns(SaetoolsWarning):
        (one,) = explain(server).explanations
    assert "(cut off at 300 tokens)" in one.failures[0].reason


def test_too_little_to_go_by_is_a_failure_too():
    some = lava_passages()
    few = {
        0: LatentPassages((), some.inactive),
        1: LatentPassages(some.active, ()),
        2: LatentPassages(some.active[:1], ()),
    }
    with fake_server(oracle) as server, pytest.warns(SaetoolsWarning, match="1 have no explanation and 2"):
        none, no_inactive, one_document = explain(server, (0, 1, 2), few.__getitem__).explanations
    assert [(one.step, one.reason) for one in none.failures] == [("explain", "no passages in which it fires")]
    assert [one.step for one in no_inactive.failures] == ["detection"]
    assert no_inactive.fuzzing.mean == 1
    assert one_document.text == "the words lava"
    assert [one.reason for one in one_document.failures] == ["too few held-out passages"] * 2


def test_several_latents_at_the_same_time_come_in_order():
    together, seen = threading.Barrier(3), []

    def in_threes(number, request):
        if number < 3:
            together.wait(10)
        return oracle(number, request)

    latents = [9, 2, 5, 4, 7]
    with fake_server(in_threes) as server:
        run = explain(server, latents, n_concurrent=3, on_progress=lambda *counts: seen.append(counts))
    assert [one.latent for one in run.explanations] == latents
    assert server.most_in_flight == 3
    assert seen == [(n, 5) for n in range(1, 6)]
    with fake_server(oracle) as server:
        alone = explain(server, latents).explanations
    assert [(one.text, one.detection, one.fuzzing) for one in run.explanations] == [
        (one.text, one.detection, one.fuzzing) for one in alone
    ]


def test_a_run_goes_on_where_it_was_killed(tmp_path):
    log = tmp_path / "new" / "log.jsonl"
    with fake_server(oracle) as server:
        whole = explain(server, (1, 2, 3)).explanations
        with pytest.warns(SaetoolsWarning, match=r"2 latents are not explained: 10 of 10 requests are spent"):
            first = explain(server, (1, 2, 3), log=log, budget=Budget(max_requests=10))
        assert [one.latent for one in first.explanations] == [1]
        assert first.unfinished == (2, 3)
        with log.open("ab") as file:
            file.write(b'{"latent": 2, "te')  # killed while it wrote
        second = explain(server, (3, 1, 2), log=log)
    assert second.n_requests == 14
    assert [one.latent for one in second.explanations] == [3, 1, 2]
    loaded = load_explanations(log)
    assert [one.latent for one in loaded] == [1, 2, 3]
    assert [(one.text, one.detection, one.fuzzing) for one in loaded] == [
        (one.text, one.detection, one.fuzzing) for one in whole
    ]
    assert {one.latent: one for one in second.explanations} == {one.latent: one for one in loaded}
    with fake_server(lambda *_: "") as server:  # nobody is asked; another address does no harm
        assert explain(server, (2,), log=log).explanations[0] == loaded[1]
        assert server.requests == []


def test_what_was_finished_before_an_interrupt_is_kept(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    with fake_server(oracle) as server:
        with pytest.raises(KeyboardInterrupt):
            explain(server, (1, 2, 3), log=tmp_path / "log", on_progress=interrupt)
        assert [one.latent for one in load_explanations(tmp_path / "log")] == [1]
        assert len(server.requests) <= 7 + 7  # of the latent that came next at most


def test_known_latents_do_not_need_a_budget(tmp_path):
    with fake_server(oracle) as server:
        explain(server, (3,), log=tmp_path / "log")
        with pytest.warns(SaetoolsWarning, match="1 latents are not explained"):
            run = explain(server, (1, 3), log=tmp_path / "log", budget=Budget(max_requests=0))
    assert [one.latent for one in run.explanations] == [3]


def test_latents_without_explanation_are_tried_again(tmp_path):
    with fake_server(lambda *_: "?") as server, pytest.warns(SaetoolsWarning, match="no explanation"):
        explain(server, log=tmp_path / "log")
    with fake_server(oracle) as server:
        explain(server, log=tmp_path / "log")
    (one,) = load_explanations(tmp_path / "log")
    assert one.text == "the words lava"


def test_a_log_of_other_passages_or_settings_is_refused(tmp_path):
    with fake_server(oracle) as server:
        explain(server, log=tmp_path / "log")
        with pytest.raises(
            InputError, match="log: expected explanations with the same config, received another for latent 7"
        ):
            explain(server, log=tmp_path / "log", config=ExplainConfig(n_shown=5, n_scored=10))
        with pytest.raises(InputError, match="the same passages_sha256"):
            explain(server, passages=lambda _: lava_passages(seed=1), log=tmp_path / "log")


def test_no_file_holds_the_key(tmp_path):
    key = "sk-very-secret"
    with fake_server(lambda *_: Bad(500, "your key: {key}")) as server, pytest.warns(SaetoolsWarning):
        run = explain(server, key=key, log=tmp_path / "log")
    assert "status 500: your key: [key]" in run.explanations[0].failures[0].reason
    run.explanations[0].save(tmp_path / "one.json")
    for name in ("log", "one.json"):
        assert key not in (tmp_path / name).read_text()
    assert Explanation.load(tmp_path / "one.json") == run.explanations[0]


def test_a_wrong_key_ends_the_run():
    with (
        fake_server(lambda *_: Bad(401)) as server,
        pytest.raises(InputError, match="check base_url, model, and api_key"),
    ):
        explain(server, range(50), n_concurrent=2)
    assert len(server.requests) < 10


def test_one_of_two_models_has_to_be_named():
    both = passage(["lava", "sea"], [1, 0], model="base")
    both.acts["tuned"] = (0.0, 2.0)
    with fake_server(oracle) as server:
        with pytest.raises(InputError, match=r"acts_of: expected one of the models with activations: base, tuned"):
            explain(server, passages=lambda _: LatentPassages((both,), ()))
        with pytest.warns(SaetoolsWarning):
            (one,) = explain(server, passages=lambda _: LatentPassages((both,), ()), acts_of="tuned").explanations
    assert one.text == "the words sea"
    assert one.provenance["acts_of"] == "tuned"


def test_a_latent_named_twice_is_refused():
    with pytest.raises(InputError, match="each latent once"):
        explain_latents([1, 1], lambda _: lava_passages(), Endpoint("http://localhost:9/v1", "m"))


def test_a_model_in_this_process_is_asked_alike(smollm, tmp_path):
    """Too weak to explain: what it says is either read or counted as missing, never made up."""
    config = ExplainConfig(n_shown=2, n_scored=2, n_per_request=2, max_attempts=2, max_tokens=12)
    with pytest.warns(SaetoolsWarning):
        run = explain_latents([7], lambda _: lava_passages(8, n_tokens=6), smollm, config=config, log=tmp_path / "log")
    (one,) = run.explanations
    assert one.model == smollm.name
    assert one.failures
    assert all("malformed in 2 attempts" in failure.reason for failure in one.failures)
    assert run.n_requests >= 2
    assert run.n_tokens > 100 * run.n_requests
    assert load_explanations(tmp_path / "log") == [one]
