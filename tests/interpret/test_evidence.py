"""What is shown and what is held out; marks, right and wrong."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from lava import lava_passages, passage

from saetools.errors import InputError
from saetools.interpret import LatentPassages
from saetools.interpret.evidence import split_evidence, strength
from saetools.interpret.marks import firing_tokens, free_marks, marked_text, wrong_tokens


def documents(passages):
    return [one.document_id for one in passages]


@pytest.mark.parametrize(("n", "n_held_out"), [(2, 1), (7, 3), (60, 20)])
def test_no_document_is_on_both_sides(n, n_held_out):
    """Two passages of each document; half of the inactive ones are from documents of active ones."""
    some = lava_passages(n)
    moved = [replace(one, document_id=other.document_id) for one, other in zip(some.inactive, some.active, strict=True)]
    evidence = split_evidence(LatentPassages(some.active * 2, (*some.inactive, *moved)), n_shown=8, n_scored=20)
    assert not set(documents(evidence.shown)) & set(documents(evidence.active + evidence.inactive))
    assert len(evidence.shown) == min(8, 2 * (n - n_held_out))
    assert len(set(documents(evidence.active))) == len(evidence.active) == n_held_out
    assert len(set(documents(evidence.inactive))) == len(evidence.inactive) == min(20, n + n_held_out)


def test_the_strongest_and_an_even_spread_are_shown():
    evidence = split_evidence(LatentPassages(lava_passages(100).active, ()), n_shown=8, n_scored=1)
    strengths = [round(strength(one, None), 1) for one in evidence.shown]
    assert strengths == sorted(strengths, reverse=True)
    assert strengths[3] >= 10.4  # four of the five strongest of 1.0 to 10.9; one may be held out
    gaps = [a - b for a, b in pairwise(strengths[4:])]
    assert all(2 < gap < 3 for gap in gaps)


def test_the_split_is_seeded():
    some = lava_passages(40)
    first, again, other = (split_evidence(some, n_scored=10, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert set(documents(first.active)) != set(documents(other.active))


def test_passages_must_be_what_they_are_said_to_be():
    silent, loud = passage(["a", "b"], [0, 0]), passage(["a", "b"], [0, 1], document=1)
    with pytest.raises(
        InputError, match=r"passages\.active: expected passages that are active in base, received one of 'made/0'"
    ):
        split_evidence(LatentPassages((silent,), ()), acts_of="base")
    with pytest.raises(InputError, match=r"passages\.inactive: expected passages that are inactive in the model"):
        split_evidence(LatentPassages((), (loud,)))


def test_negative_activations_fire_too():
    negative = passage(["a", "b", "c"], [0, -4, -1])
    assert strength(negative, None) == 4
    assert firing_tokens(negative, None, threshold=0.5) == [False, True, False]
    assert split_evidence(LatentPassages((negative,), ())).shown == (negative,)


def test_runs_of_tokens_above_the_threshold_are_marked():
    one = passage(["a", "b", "c", "d", "e"], [0.4, 0.6, 1.0, 0, 0.9])
    marked = firing_tokens(one, None, threshold=0.5)
    assert marked_text(one, marked, ("<<", ">>")) == " a<< b c>> d<< e>>"
    assert firing_tokens(one, None, threshold=0.0) == [True, True, True, False, True]


def test_marks_are_not_in_the_texts():
    texts = ["cout << x;", "a[[1]]", "<1< and >1>"]
    passages = [passage([text], [1]) for text in texts]
    assert [free_marks(passages[:n]) for n in range(4)] == [("<<", ">>"), ("[[", "]]"), ("<1<", ">1>"), ("<2<", ">2>")]


def test_wrong_marks_are_as_many_and_as_long_but_where_nothing_fires():
    generator = torch.Generator().manual_seed(0)
    one = passage(list("abcdefghijkl"), [0, 2, 2, 0, 0.1, 0, 0, 0, 2, 0, 0, 0])
    marked = firing_tokens(one, None, threshold=0.5)
    seen = set()
    for _ in range(200):
        wrong = wrong_tokens(one, marked, None, generator=generator)
        assert not any(is_wrong and act for is_wrong, act in zip(wrong, one.acts["base"], strict=True))
        runs = "".join("x" if is_wrong else " " for is_wrong in wrong).split()
        assert sorted(runs) == ["x", "xx"]
        seen.add(tuple(wrong))
    assert len(seen) > 5


def test_no_room_for_wrong_marks():
    generator = torch.Generator().manual_seed(0)
    for acts in ([1, 1, 1], [2, 2, 0, 1, 0], [1, 0.1, 0.1]):
        one = passage(["a"] * len(acts), acts)
        marked = firing_tokens(one, None, threshold=0.5)
        assert wrong_tokens(one, marked, None, generator=generator) is None
