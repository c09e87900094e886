"""The judge of coherence, against a real server that answers well and badly."""

import pytest
from fake_endpoint import Bad, fake_server

from saetools.endpoint import Endpoint
from saetools.evaluate import coherence_judge
from saetools.evaluate.judge import read_score


def test_scores_come_in_the_order_of_the_answers():
    def behave(_number, request):
        asked = request["messages"][-1]["content"]
        return "90" if "\nfine\n" in asked + "\n" else "5" if "zzz" in asked else "I would say it is good."

    with fake_server(behave) as server:
        judge = coherence_judge(Endpoint(server.url, "m", max_retries=0))
        assert judge([("Q?", "fine"), ("Q?", "zzz"), ("Q?", "other"), ("Q?", "fine")]) == [90.0, 5.0, None, 90.0]
        assert "Q?" in server.requests[0]["messages"][-1]["content"]
    with fake_server(lambda *_: Bad(status=500)) as server:
        assert coherence_judge(Endpoint(server.url, "m", max_retries=0))([("Q?", "a")]) == [None]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("87", 87.0),
        (" Score: 40.", 40.0),
        ("0", 0.0),
        ("100", 100.0),
        ("72.5", 72.5),
        ("85/100", 85.0),
        ("60 out of 100", 60.0),
        ("101", None),
        ("-5", None),
        ("between 40 and 60", None),
        ("", None),
        ("high", None),
    ],
)
def test_a_verdict_is_one_number(text, score):
    assert read_score(text) == score
