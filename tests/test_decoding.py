"""Lanes: rows that join and leave while others are answered get the answers that they would get alone."""

import random

import pytest
import torch
from tiny_sae import make_sae

from saetools import Conversation, SamplingConfig, Site, generate, steer
from saetools.decoding import Lane, Row
from saetools.errors import NonFiniteError
from saetools.generation import random_stream, tokenize_prompts

SITE = Site(1)
V = 3 * torch.randn(32, generator=torch.Generator().manual_seed(2))
PROMPTS = ["Hi", "What is the weather like today?", Conversation.chat("Name a colour.", system="Be brief.")]
EDITS = [
    None,
    {SITE: steer.clamp(make_sae(), 3, 9.0).on("response")},
    {SITE: [steer.add_direction(V, 1.0)], Site(0, "mlp_out"): steer.project_out(V).on("prompt")},
    {SITE: steer.add_direction(V, 2.0).over({0: 0.0, 2: 1.0, 6: 0.0})},
    {SITE: steer.add_direction(V, -2.0).over({0: 0.0, 2: 1.0, 6: 0.0})},
]


def row_of(lm, prompt, edits, **settings):
    (tokenized,) = tokenize_prompts(lm, [PROMPTS[prompt]])
    defaults = {"max_new_tokens": 9, "temperature": 1.0}
    return Row(tokenized, EDITS[edits], random_stream(3, prompt, edits), **{**defaults, **settings})


def alone(lm, prompt, edits, **settings):
    row = row_of(lm, prompt, edits, **settings)
    lane = Lane(lm)
    lane.admit([row])
    while not row.is_done:
        lane.step()
    return row


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "mistral", "gpt2", "gpt_neox"])
def test_rows_that_come_and_go_get_the_answers_of_rows_alone(make_tiny, family):
    lm = make_tiny(family)
    jobs = [(prompt, edits) for prompt in range(3) for edits in range(5)]
    settings = {
        job: {"max_new_tokens": 2 + number % 8, "temperature": number % 2 / 1} for number, job in enumerate(jobs)
    }
    rng = random.Random(0)
    rng.shuffle(jobs)
    rows, waiting, lane = {}, list(jobs), Lane(lm)
    while waiting or lane.rows:
        if waiting and (not lane.rows or rng.random() < 0.7):
            some = [waiting.pop() for _ in range(min(len(waiting), rng.randint(1, 3)))]
            new = {job: row_of(lm, *job, **settings[job]) for job in some}
            rows |= new
            lane.admit(list(new.values()))
        if rng.random() < 0.7:
            lane.drop([row for row in lane.rows if row.is_done])
        if lane.rows:
            lane.step()
    for job in jobs:
        expected = alone(lm, *job, **settings[job])
        assert rows[job].token_ids == expected.token_ids, job
        assert rows[job].finished == expected.finished
    assert len({tuple(row.token_ids) for row in rows.values()}) > 10


def test_a_lane_answers_as_generate_does(make_tiny):
    lm = make_tiny("llama")
    config = SamplingConfig(9, seed=3)
    for prompt in range(3):
        for edits in range(5):
            row = row_of(lm, prompt, edits)
            row.stream = random_stream(3, 0, 0)
            lane = Lane(lm)
            lane.admit([row])
            while not row.is_done:
                lane.step()
            (answer,) = generate(lm, [PROMPTS[prompt]], variants={"x": EDITS[edits]}, config=config)
            assert answer.token_ids == tuple(row.answer_ids)


def test_log_probabilities_are_those_of_the_edited_model(make_tiny):
    lm = make_tiny("llama")
    row = alone(lm, 1, 2, n_top=3)
    assert len(row.log_probs) == len(row.top) == len(row.token_ids)
    from saetools.models import edit, final_hidden, logits

    ids = torch.cat([row.prompt.token_ids, torch.tensor(row.token_ids)])[None]
    roles = torch.cat([row.prompt.roles, torch.full((len(row.token_ids),), 8, dtype=torch.uint8)])[None]
    with torch.no_grad(), edit(lm, EDITS[2], roles=roles):
        scores = logits(lm, final_hidden(lm, ids, torch.ones_like(ids, dtype=torch.bool))).log_softmax(-1)[0]
    for place, token in enumerate(row.token_ids, len(row.prompt) - 1):
        number = place - len(row.prompt) + 1
        assert row.log_probs[number] == pytest.approx(float(scores[place, token]), abs=1e-4)
        best = scores[place].topk(3)
        assert [token for token, _ in row.top[number]] == best.indices.tolist()
        assert [value for _, value in row.top[number]] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_row_whose_output_is_not_finite_leaves_the_others_alone(make_tiny):
    lm = make_tiny("llama")
    bad = row_of(lm, 0, 0)
    bad.edits = {SITE: lambda acts, where: acts + torch.where((where.steps == 3)[..., None], torch.inf, 0.0)}
    good = row_of(lm, 1, 2)
    lane = Lane(lm)
    lane.admit([bad, good])
    while not good.is_done:
        lane.step()
    assert (bad.broken, bad.is_done, len(bad.token_ids)) == (True, True, 3)
    assert good.token_ids == alone(lm, 1, 2).token_ids
    with pytest.raises(NonFiniteError, match="the output of the model under 'x' is not finite; lower the strength"):
        generate(lm, ["Hi"], variants={"plain": None, "x": bad.edits}, config=SamplingConfig(5))


def test_an_empty_lane_starts_afresh(make_tiny):
    lm = make_tiny("llama")
    first, second = row_of(lm, 1, 0, max_new_tokens=2), row_of(lm, 0, 3)
    lane = Lane(lm)
    lane.admit([first])
    lane.step()
    lane.drop([first])
    assert lane.rows == []
    lane.drop([])
    lane.admit([second])
    while not second.is_done:
        lane.step()
    assert second.token_ids == alone(lm, 0, 3).token_ids
