"""Numbers, intervals and conclusions in words."""

from __future__ import annotations

import math

import pytest

from saetools.report import PersonaReport
from saetools.report.doses import group_doses
from saetools.report.wording import estimate, mean_and_interval, number, percent, some_latents, token, visible
from saetools.stats import Estimate


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"),
        (-0.4125, "\u22120.412"),
        (0.0004, "4.0e\u221204"),
        (1234.5, "1,234.500"),
        (2e7, "2.0e+07"),
        (math.inf, "\u221e"),
        (-math.inf, "\u2212\u221e"),
        (math.nan, "undefined"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_signs_and_shares() -> None:
    assert number(0.5, 1, signed=True) == "+0.5"
    assert percent(0.0421) == "4.21 %"


def test_intervals_show_on_which_side_of_zero_they_end() -> None:
    assert mean_and_interval(-0.068, -0.1386, 0.0004) == "\u22120.0680 [\u22120.1386, 0.0004]"
    assert estimate(Estimate(0.25, 0.1, 0.4, 0.05, 9), signed=True) == "+0.250 [+0.100, +0.400]"


def test_hidden_characters_show_and_others_stay() -> None:
    assert visible("a\u202eb\x00\ufeff\r\nc\t\U0001f469\u200d\U0001f4bb \u00e9\u00a0\u5929") == (
        "a[U+202E]b[U+0000][U+FEFF]\nc\t\U0001f469\u200d\U0001f4bb \u00e9\u00a0\u5929"
    )
    assert token(" a\n") == "\u2423a\u21b5"


def test_latent_sets_by_name() -> None:
    assert some_latents(()) == "no latents"
    assert some_latents((7,)) == "latent 7"
    assert some_latents((1, 2, 3, 4, 5)) == "latents 1, 2, 3, 4 and 1 more"


def test_doses_are_grouped_and_summed_up(report: PersonaReport) -> None:
    groups = group_doses(report)
    assert [(group.model, group.edit) for group in groups] == [
        ("base", "add"), ("base", "clamp"), ("tuned", "add"), ("tuned", "clamp"),
    ]  # fmt: skip
    assert sum(len(group.rows) for group in groups) == len(report.dose_response)
    first = groups[0]
    assert [row.control for row in first.rows[:3]] == ["none", "equal_norm", "equal_perplexity"]
    assert first.unedited == pytest.approx(-0.412)
    against = [row.against for row in first.series("equal_perplexity")]
    above = sum(one is not None and one.low > 0 for one in against)
    assert f"Edit minus control (random, equal perplexity): interval above zero at {above}" in first.summary()
    assert "Unedited: score \u22120.412, perplexity 21.4." in first.summary()
