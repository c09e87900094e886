"""Balanced accuracy and its interval; files of explanations."""

import numpy as np
import pytest

from saetools.errors import InputError, IntegrityError
from saetools.interpret import Explanation, Failure, load_explanations
from saetools.interpret.explanation import ExplanationLog, balanced_accuracy
from saetools.stats import Estimate


def test_it_is_the_mean_of_both_shares():
    score = balanced_accuracy([True] * 9 + [False], [True, False])
    assert (score.mean, score.n) == (pytest.approx(0.7), 12)
    assert score.low < 0.7 < score.high
    variances = 9.5 * 1.5 / (11**2 * 12), 1.5 * 1.5 / (3**2 * 4)  # of Beta(9.5, 1.5) and Beta(1.5, 1.5)
    assert score.se == pytest.approx(sum(variances) ** 0.5 / 2, rel=0.03)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("n", [10, 40])
def test_intervals_hold_the_truth_as_often_as_they_say(share, n):
    generator = np.random.default_rng(0)
    verdicts = generator.random((400, 2, n)) < share
    scores = [balanced_accuracy(*sides.tolist(), seed=number) for number, sides in enumerate(verdicts)]
    covered = np.mean([score.low <= share <= score.high for score in scores])
    assert covered > 0.9


def test_both_kinds_have_to_be_judged():
    with pytest.raises(InputError, match="received 1 and 0"):
        balanced_accuracy([True], [])


def make(latent=3, text="caf\u00e9\nline"):
    failures = (Failure("fuzzing", 2, "status 500"),)
    return Explanation(latent, text, "m", Estimate(0.9, 0.8, 1.0, 0.05, 10), None, 5, failures, {"seed": 0})


def test_explanations_are_saved_and_read_alike(tmp_path):
    one = make()
    assert Explanation.load(one.save(tmp_path / "one.json")) == one
    log = ExplanationLog(tmp_path / "log")
    for each in (one, make(latent=1), make(text="later")):
        log.append(each)
    assert load_explanations(tmp_path / "log") == [make(latent=1), make(text="later")]


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "log"
    ExplanationLog(path).append(make())
    path.write_bytes(path.read_bytes() + b'{"latent": 1}\n')
    with pytest.raises(IntegrityError, match=f"{path}:2 is no explanation"):
        load_explanations(path)
    with pytest.raises(IntegrityError, match="log:2 is no explanation"):
        ExplanationLog(path)
    with pytest.raises(InputError, match="path: expected a file that exists"):
        load_explanations(tmp_path / "none")
