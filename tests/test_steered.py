"""A steered model passes for the Hugging Face model: generation of every kind, pipelines, adapters."""

import pytest
import torch
from test_steer import CHATS, V
from tiny_sae import make_sae, with_random_adapter
from transformers import pipeline

from saetools import Site, edit, steer, steered_model
from saetools.data import Conversation, pad, tokenize
from saetools.errors import InputError
from saetools.models import final_hidden, logits

SITE = Site(1)
PROMPTS = [Conversation.chat("Hi there"), Conversation.chat("What is the weather like?")]
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
EDITS = {
    "all": steer.add_direction(V, 2.0),
    "generated": steer.add_direction(V, 6.0).on("generated"),
    "fading": steer.add_direction(V, 6.0).over({0: 0.0, 1: 1.0, 4: 0.0}),
    "latents": steer.clamp(make_sae(), [3, 5], 9.0).on(start=4),
    "response": steer.clamp(make_sae("relu"), 3, 9.0).on("response"),
}


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt2"])
def lm(request, make_tiny):
    return make_tiny(request.param)


@pytest.fixture(scope="module")
def batch(tokenizer):
    return pad(list(tokenize(PROMPTS, tokenizer, add_generation_prompt=True)), [0, 1], pad_left=True)


def by_hand(lm, batch, fn, n=8):
    """Greedy answers without a cache: each step runs everything again."""
    ids, mask = batch.token_ids, batch.mask
    with torch.no_grad(), edit(lm, {SITE: fn}, roles=batch.roles):
        for _ in range(n):
            scores = logits(lm, final_hidden(lm, ids, mask)[:, -1])
            scores[:, [lm.tokenizer.eos_token_id]] = -torch.inf
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids


def answer(model, batch, **options):
    settings = {**GREEDY, **options}
    return model.generate(batch.token_ids, attention_mask=batch.mask.long(), roles=batch.roles, **settings)


@pytest.mark.parametrize("name", EDITS)
def test_generation_is_that_of_passes_by_hand(lm, batch, name):
    expected = by_hand(lm, batch, EDITS[name])
    assert not torch.equal(expected, by_hand(lm, batch, []))
    model = steered_model(lm, {SITE: EDITS[name]})
    assert torch.equal(answer(model, batch), expected)
    for options in (
        {"use_cache": False},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "static"},
        {"num_beams": 1, "num_return_sequences": 1},
    ):
        assert torch.equal(answer(model, batch, **options), expected), options
    for row, prompt in enumerate(PROMPTS):
        one = pad(list(tokenize([prompt], lm.tokenizer, add_generation_prompt=True)), [0])
        assert torch.equal(answer(model, one)[0, one.token_ids.shape[1] :], expected[row, batch.token_ids.shape[1] :])
        looked_up = answer(model, one, prompt_lookup_num_tokens=3)
        assert torch.equal(looked_up[0, one.token_ids.shape[1] :], expected[row, batch.token_ids.shape[1] :])


@pytest.mark.parametrize("name", EDITS)
def test_assisted_generation_by_a_plain_model_gives_the_steered_answer(make_tiny, batch, name):
    lm, assistant = make_tiny("llama"), make_tiny("llama").model
    model = steered_model(lm, {SITE: EDITS[name]})
    one = pad(list(tokenize(PROMPTS[:1], lm.tokenizer, add_generation_prompt=True)), [0])
    assert torch.equal(answer(model, one, assistant_model=assistant), answer(model, one))


@pytest.mark.parametrize("name", EDITS)
def test_beams_are_edited_as_their_rows(lm, batch, name):
    model = steered_model(lm, {SITE: EDITS[name]})
    beams = answer(model, batch, num_beams=3)
    for row, prompt in enumerate(PROMPTS):
        one = pad(list(tokenize([prompt], lm.tokenizer, add_generation_prompt=True)), [0])
        alone = answer(model, one, num_beams=3)
        assert torch.equal(alone[0, one.token_ids.shape[1] :], beams[row, batch.token_ids.shape[1] :])


def test_forward_is_that_of_an_edit_block_and_the_model_stays_as_it_is(lm, batch):
    push = steer.add_direction(V, 2.0)
    model = steered_model(lm, {SITE: push})
    inputs = {"input_ids": batch.token_ids, "attention_mask": batch.mask.long()}
    with torch.no_grad():
        plain = lm.model(**inputs).logits
        with edit(lm, {SITE: push}):
            expected = lm.model(**inputs).logits
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(lm.model(**inputs).logits, plain)
        assert torch.equal(steered_model(lm, {})(**inputs).logits, plain)
    assert isinstance(model, type(lm.model))
    assert type(model).__name__ == type(lm.model).__name__
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), lm.model.parameters(), strict=True))
    assert "under blocks.1.hook_resid_post: add_direction (norm" in repr(model)


def test_a_steered_view_sees_its_own_adapter(make_tiny, batch):
    tuned = with_random_adapter(make_tiny("llama"))
    fn = steer.add_direction(V, 2.0)
    models = {name: steered_model(view, {SITE: fn}) for name, view in (("base", tuned.base), ("tuned", tuned))}
    answers = {name: answer(model, batch) for name, model in models.items()}
    assert torch.equal(answers["base"], by_hand(tuned.base, batch, fn))
    assert torch.equal(answers["tuned"], by_hand(tuned, batch, fn))
    assert not torch.equal(answers["base"], answers["tuned"])


def test_a_pipeline_takes_a_steered_model(lm):
    model = steered_model(lm, {SITE: EDITS["generated"]})
    with torch.no_grad():
        pipe = pipeline("text-generation", model=model, tokenizer=lm.tokenizer)
        messages = [{"role": "user", "content": CHATS[0].messages[0].content}]
        said = pipe(messages, **GREEDY, return_full_text=False)[0]["generated_text"]
    one = pad(list(tokenize(PROMPTS[:1], lm.tokenizer, add_generation_prompt=True)), [0])
    ids = answer(model, one)[0, one.token_ids.shape[1] :]
    assert said == lm.tokenizer.decode(ids, skip_special_tokens=True)


def test_sites_are_checked_at_once(lm):
    with pytest.raises(InputError, match="site: expected a layer below 3"):
        steered_model(lm, {Site(3): EDITS["all"]})


def test_a_steered_model_is_not_saved_as_if_it_were_plain(lm, tmp_path):
    with pytest.raises(InputError, match=r"put the edits into the weights: saetools\.bake_edits"):
        steered_model(lm, {SITE: EDITS["all"]}).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_static_caches_that_hide_padding_are_seen_through(make_tiny, batch):
    """All of a Mistral's layers look back a little: the masks of its static cache are shorter than what was read."""
    lm = make_tiny("mistral", sliding_window=8)
    for name in ("generated", "latents"):
        expected = by_hand(lm, batch, EDITS[name], n=12)
        model = steered_model(lm, {SITE: EDITS[name]})
        settings = {"max_new_tokens": 12, "min_new_tokens": 12, "cache_implementation": "static"}
        assert torch.equal(answer(model, batch, **settings), expected)
