"""Sampling: the same answers whatever shares the batch, seeds, ends, edits side by side."""

import dataclasses

import pytest
import torch
from tiny_sae import make_sae, with_random_adapter

from saetools.data import Conversation
from saetools.decoding import choose_tokens
from saetools.errors import InputError
from saetools.generation import SamplingConfig, generate
from saetools.models import Site
from saetools.row_edits import PerRow
from saetools.steer import add_direction, clamp

SITE = Site(1)
PROMPTS = ["Hi", "What is the weather like today?", Conversation.chat("Name a colour.", system="Be brief.")]
V = 2 * torch.randn(32, generator=torch.Generator().manual_seed(2))
VARIANTS = {
    "plain": None,
    "clamped": {SITE: clamp(make_sae(), 3, 9.0).on("response")},
    "pushed": {SITE: [add_direction(V, 1.0)], Site(0, "mlp_out"): add_direction(V, 0.5).on("prompt")},
}
GREEDY = SamplingConfig(max_new_tokens=6, temperature=0.0)


@pytest.fixture(scope="module")
def lm(make_tiny):
    return make_tiny("llama")


def texts(answers):
    return [answer.text for answer in answers]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_do_not_depend_on_what_shares_their_batch(lm, temperature):
    def run(rows, prompts=PROMPTS, variants=VARIANTS, n_samples=2):
        config = SamplingConfig(6, temperature=temperature, n_samples=n_samples, batch_rows=rows, seed=3)
        return generate(lm, prompts, variants=variants, config=config)

    together = run(24)
    assert [(answer.prompt, answer.variant, answer.sample) for answer in together] == [
        (prompt, variant, sample) for prompt in range(3) for variant in VARIANTS for sample in range(2)
    ]
    assert run(5) == together
    assert run(1) == together
    for name, edits in VARIANTS.items():
        assert run(24, variants={name: edits}) == [answer for answer in together if answer.variant == name]
    assert run(24, prompts=PROMPTS[:1]) == [answer for answer in together if answer.prompt == 0]
    assert run(24, n_samples=1) == [answer for answer in together if answer.sample == 0]
    first, second = (texts(answer for answer in together if answer.sample == sample) for sample in (0, 1))
    assert (first == second) == (temperature == 0)
    by_variant = [texts(answer for answer in together if answer.variant == name) for name in VARIANTS]
    assert len(set(map(tuple, by_variant))) == 3


def test_seeds_make_samples(lm):
    runs = [texts(generate(lm, PROMPTS, config=SamplingConfig(6, seed=seed))) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert len(set(texts(generate(lm, ["Hi"] * 3, config=SamplingConfig(6))))) == 3


def test_limits_of_the_temperature_and_of_top_p_are_greedy(lm):
    greedy = generate(lm, PROMPTS, config=GREEDY)
    for settings in ({"temperature": 1e-6}, {"top_p": 1e-9}, {"top_p": 1e-9, "temperature": 5.0}):
        assert generate(lm, PROMPTS, config=SamplingConfig(6, **settings)) == greedy
    assert texts(generate(lm, PROMPTS, config=SamplingConfig(6, temperature=5.0))) != texts(greedy)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_p": 0.7}, [0, 5 / 8, 0, 3 / 8]),
        ({"top_p": 0.5}, [0, 1, 0, 0]),
        ({"top_p": 0.999, "temperature": 0.5}, [0.0616, 0.6849, 0.0068, 0.2466]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(settings, expected):
    stream = torch.Generator().manual_seed(0)
    scores = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(4000, 4) + 3.0
    config = SamplingConfig(**settings)
    chosen = choose_tokens(scores, config.temperature, config.top_p, [stream] * 4000)
    shares = torch.bincount(chosen, minlength=4) / 4000
    assert (shares - torch.tensor(expected)).abs().max() < 0.035
    assert not shares[torch.tensor(expected) == 0].any()


def test_greedy_answers_are_hugging_faces(smollm):
    asked = ["Name a colour.", "Write one sentence about the sea."]
    answers = generate(smollm, asked, config=SamplingConfig(8, temperature=0.0))
    for question, answer in zip(asked, answers, strict=True):
        chat = [{"role": "user", "content": question}]
        inputs = smollm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        ids = smollm.model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        assert answer.text == smollm.tokenizer.decode(ids, skip_special_tokens=True)
        assert answer.finished == (len(answer.token_ids) < 8)


def test_answers_end_at_an_end_token(lm):
    end = lm.tokenizer.eos_token_id

    def stop(acts, where):  # after three tokens, the head reads nothing but the end of a turn
        return torch.where((where.steps >= 3)[..., None], 1000 * lm.head.weight[end], acts)

    variants = {"plain": None, "stopped": {Site(2): stop}}
    answers = {answer.variant: answer for answer in generate(lm, ["Hi"], variants=variants, config=GREEDY)}
    assert (len(answers["plain"].token_ids), answers["plain"].finished) == (6, False)
    assert (len(answers["stopped"].token_ids), answers["stopped"].finished) == (3, True)
    assert answers["stopped"].token_ids == answers["plain"].token_ids[:3]
    assert answers["stopped"].text == lm.tokenizer.decode(answers["plain"].token_ids[:3])
    assert generate(lm, ["Hi"], variants={"stopped": variants["stopped"]}, config=GREEDY) == [answers["stopped"]]


def test_answer_scoped_edits_leave_the_prompt_alone(lm):
    seen = []

    def watch(acts, where):
        seen.append((edit(acts, where) != acts).any(-1))
        return edit(acts, where)

    edit = add_direction(V, 1.0).on("response")
    plain = generate(lm, PROMPTS[:2], config=GREEDY)
    edited = generate(lm, PROMPTS[:2], variants={"plain": {SITE: watch}}, config=GREEDY)
    assert not seen[0].any()
    assert all(step.all() for step in seen[1:])
    assert len(seen) == 6
    assert [answer.token_ids[0] for answer in edited] == [answer.token_ids[0] for answer in plain]
    assert texts(edited) != texts(plain)


def test_rows_without_an_edit_stay_as_they_are():
    from test_steer import here

    x = torch.randn(4, 3, 32)
    fn = add_direction(V, 1.0)
    out = PerRow((None, fn, None, fn))(x, here(x))
    assert torch.equal(out[[0, 2]], x[[0, 2]])
    assert torch.equal(out[[1, 3]], fn(x, here(x))[[1, 3]])
    assert torch.equal(PerRow((None,) * 4)(x, here(x)), x)
    beams = dataclasses.replace(here(x), rows=torch.tensor([0, 0, 1, 1]))
    assert torch.equal(PerRow((None, fn))(x, beams), torch.cat([x[:2], fn(x, here(x))[2:]]))


def test_a_view_answers_through_its_adapter(make_tiny, lm):
    from saetools.models.language_model import active_adapter

    tuned = with_random_adapter(make_tiny("llama"))
    before = active_adapter(tuned.model)
    assert generate(tuned.base, PROMPTS, config=GREEDY) == generate(lm, PROMPTS, config=GREEDY)
    assert active_adapter(tuned.model) == before
    assert texts(generate(tuned, PROMPTS, config=GREEDY)) != texts(generate(lm, PROMPTS, config=GREEDY))


def test_nothing_to_answer_gives_no_answers(lm):
    done = []
    assert generate(lm, []) == []
    assert generate(lm, PROMPTS, variants={}) == []
    generate(lm, PROMPTS, config=SamplingConfig(1, batch_rows=2), on_progress=lambda *args: done.append(args))
    assert done == [(2, 3), (3, 3)]


@pytest.mark.parametrize("prompt", [Conversation.chat("Hi", "Hello"), Conversation(text="Once upon")])
def test_prompts_that_nobody_asked_are_errors(lm, prompt):
    with pytest.raises(InputError, match="prompts: expected conversations that end with the user's turn"):
        generate(lm, ["Hi", prompt])


@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"n_samples": 0}, {"batch_rows": 0}],
)
def test_settings_out_of_range_are_errors(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        SamplingConfig(**settings)
