"""Which tokens an edit is told it sees: padding, KV cache, roles, generated steps, beams."""

import pytest
import torch

from saetools.data.roles import Role
from saetools.errors import InputError
from saetools.models import Site, edit, final_hidden, read, token_log_probs
from saetools.models.passes import Passes

SITE = Site(1, "resid_mid")
ROWS = [[5, 6, 7, 8, 9], [10, 11, 12]]
V = 3 * torch.randn(32, generator=torch.Generator().manual_seed(2))
PROMPT, HEADER, RESPONSE = (int(role) for role in (Role.PROMPT, Role.HEADER, Role.RESPONSE))
CACHED = ["llama", "gemma3_text", "gpt2", "gpt_neox"]


def padded(rows, *, left):
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), True
    return ids, mask


class Recorder:
    """An edit that changes nothing and keeps what it was told."""

    def __init__(self):
        self.seen = []

    def __call__(self, acts, where):
        self.seen.append(where)
        return acts


@pytest.fixture
def cached_lm(request, make_tiny):
    return make_tiny(request.param)


def generate(lm, ids, mask, edits, roles=None, **options):
    with edit(lm, edits, roles=roles):
        return lm.model.generate(ids, attention_mask=mask.long(), do_sample=False, **options)[:, ids.shape[1] :]


def scoped(choose):
    return {SITE: lambda acts, where: acts + V * choose(where)[..., None]}


@pytest.mark.parametrize(
    ("left", "positions"), [(True, [[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]]), (False, [[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]])]
)
def test_positions_count_tokens_and_skip_padding(tiny, left, positions):
    ids, mask = padded(ROWS, left=left)
    roles = torch.where(mask, PROMPT, 0).to(torch.uint8)
    recorder = Recorder()
    with edit(tiny, {SITE: recorder}, roles=roles):
        read(tiny, ids, mask, [SITE])
    (where,) = recorder.seen
    assert where.positions.tolist() == positions
    assert torch.equal(where.token_ids, ids)
    assert torch.equal(where.mask, mask)
    assert torch.equal(where.roles, roles)
    assert where.rows.tolist() == [0, 1]
    assert where.steps.tolist() == [[0] * 5] * 2
    second = where[1:]
    assert (second.rows.tolist(), second.positions.tolist(), len(second.roles)) == ([1], positions[1:], 1)
    assert torch.equal(where[torch.tensor([1])].mask, mask[1:])


def test_without_mask_all_tokens_count(family_lm):
    ids = torch.tensor([[5, 6, 7]])
    recorder = Recorder()
    with edit(family_lm, {Site(0): recorder}):
        family_lm.model(ids)
        family_lm.model(inputs_embeds=family_lm.model.get_input_embeddings()(ids))
    for where in recorder.seen:
        assert where.positions.tolist() == [[0, 1, 2]]
        assert where.mask.all()
        assert where.roles is None
    assert torch.equal(recorder.seen[0].token_ids, ids)
    assert recorder.seen[1].token_ids is None


@pytest.mark.parametrize(
    "mask", [torch.ones(1, 1, 3, 3), torch.ones(1, 2), torch.ones(2, 3), {"full_attention": "causal"}], ids=str
)
def test_masks_that_do_not_tell_the_padding_are_errors(tiny, mask):
    with pytest.raises(InputError, match=r"attention_mask: expected shape \(1, 3\)"), edit(tiny, {SITE: Recorder()}):
        tiny.model(torch.tensor([[5, 6, 7]]), attention_mask=mask)


def test_masks_of_static_caches_tell_the_padding():
    allowed = torch.tensor([[False, True, True, True, False]])
    additive = torch.where(allowed, 0.0, -1e9)[:, None, None].expand(1, 1, 2, 5)
    for mask in (allowed[:, None, None], additive, {"full_attention": additive, "sliding_attention": None}):
        passes = Passes()
        where = passes._placed({"attention_mask": mask}, torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4))
        assert where.mask.tolist() == allowed[:, :4].tolist()
        assert where.positions.tolist() == [[-1, 0, 1, 2]]


def test_calls_without_tokens_are_errors(tiny):
    with pytest.raises(InputError, match="input_ids: expected a tensor"), edit(tiny, {SITE: Recorder()}):
        tiny.model([[5, 6, 7]])


def test_roles_of_another_batch_are_errors(tiny):
    ids, mask = padded(ROWS, left=True)
    message = "roles: expected a number of rows that divides the batch of 2, received 3"
    roles = torch.zeros(3, 5, dtype=torch.uint8)
    with pytest.raises(InputError, match=message), edit(tiny, {SITE: Recorder()}, roles=roles):
        read(tiny, ids, mask, [SITE])


@pytest.mark.parametrize("cached_lm", CACHED, indirect=True)
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_tells_steps_roles_and_positions(cached_lm, use_cache):
    ids, mask = padded(ROWS, left=True)
    roles = torch.where(mask, PROMPT, 0).to(torch.uint8)
    roles[:, -1] = HEADER
    recorder = Recorder()
    tokens = generate(
        cached_lm, ids, mask, {SITE: recorder}, roles, min_new_tokens=4, max_new_tokens=4, use_cache=use_cache
    )
    assert len(recorder.seen) == 4
    expected_positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [-1, -1, 0, 1, 2, 3, 4, 5]])
    all_ids = torch.cat([ids, tokens], dim=1)
    all_roles = torch.cat([roles, torch.full((2, 3), RESPONSE, dtype=torch.uint8)], dim=1)
    for step, where in enumerate(recorder.seen):
        place = slice(4 + step if use_cache and step else 0, 5 + step)
        assert torch.equal(where.token_ids, all_ids[:, place])
        assert torch.equal(where.positions, expected_positions[:, place])
        assert torch.equal(where.roles, all_roles[:, place])
        assert where.steps.tolist() == [[0, 0, 0, 0, 0, 1, 2, 3][place]] * 2


@pytest.mark.parametrize("cached_lm", CACHED, indirect=True)
@pytest.mark.parametrize(
    "choose",
    [
        lambda where: where.positions == 0,
        lambda where: where.positions > 3,
        lambda where: where.steps % 2 == 1,
        lambda where: (where.roles & RESPONSE) != 0,
        lambda where: (where.roles & PROMPT) != 0,
    ],
    ids=["first", "late", "odd steps", "response", "prompt"],
)
def test_scoped_edits_give_the_same_tokens_with_and_without_a_cache(cached_lm, choose):
    ids, mask = padded(ROWS, left=True)
    roles = torch.where(mask, PROMPT, 0).to(torch.uint8)

    def run(edits, use_cache):
        settings = {"min_new_tokens": 8, "max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
        with edit(cached_lm, edits, roles=roles):
            return cached_lm.model.generate(
                ids, attention_mask=mask.long(), do_sample=False, use_cache=use_cache, **settings
            )

    cached, uncached, plain = run(scoped(choose), True), run(scoped(choose), False), run({}, True)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=1e-4, atol=1e-4)
    assert (torch.stack(cached.logits) - torch.stack(plain.logits)).abs().max() > 0.1


def test_a_row_scoped_edit_reaches_the_beams_of_its_row(tiny):
    ids, mask = padded([[5, 6, 7, 8], [10, 11, 12, 13]], left=True)
    roles = torch.full((2, 4), PROMPT, dtype=torch.uint8)
    settings = {"num_beams": 3, "min_new_tokens": 6, "max_new_tokens": 6}
    recorder = Recorder()
    second_row = {SITE: [recorder, lambda acts, where: acts + V * (where.rows == 1)[:, None, None]]}
    both = generate(tiny, ids, mask, second_row, roles, **settings)
    assert {tuple(where.rows.tolist()) for where in recorder.seen} <= {(0, 1), (0, 0, 0, 1, 1, 1)}
    assert len(recorder.seen[-1].rows) == 6
    everywhere = {SITE: lambda acts, where: acts + V}
    assert torch.equal(both[:1], generate(tiny, ids[:1], mask[:1], {}, **settings))
    assert torch.equal(both[1:], generate(tiny, ids[1:], mask[1:], everywhere, **settings))
    assert not torch.equal(both[1:], generate(tiny, ids[1:], mask[1:], {}, **settings))


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(family_lm, family_sites, left):
    ids, mask = padded(ROWS, left=left)
    scored = mask & (torch.where(mask, mask.cumsum(1) - 1, -1) > 0)
    edits = scoped(lambda where: where.positions == 1) if SITE in family_sites else {}
    with torch.no_grad(), edit(family_lm, edits):
        acts = read(family_lm, ids, mask, family_sites)
        hidden = final_hidden(family_lm, ids, mask)
        log_probs = token_log_probs(family_lm, ids, mask, scored).split([len(row) - 1 for row in ROWS])
        for number, row in enumerate(ROWS):
            alone, full = torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool)
            for site, expected in read(family_lm, alone, full, family_sites).items():
                torch.testing.assert_close(acts[site][number][mask[number]], expected[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(hidden[number][mask[number]], final_hidden(family_lm, alone, full)[0])
            after_first = torch.arange(len(row))[None] > 0
            torch.testing.assert_close(log_probs[number], token_log_probs(family_lm, alone, full, after_first))


def test_a_cached_pass_continues_under_the_same_edit(family_lm):
    from transformers import DynamicCache

    ids, mask = padded(ROWS, left=True)
    edits = {Site(1): lambda acts, where: acts + V * (where.positions % 2 == 0)[..., None]}
    cache = DynamicCache(config=family_lm.model.config)
    with torch.no_grad(), edit(family_lm, edits):
        whole = final_hidden(family_lm, ids, mask)
        parts = [
            final_hidden(family_lm, ids[:, start:end], mask[:, :end], cache=cache)
            for start, end in ((0, 3), (3, 4), (4, 5))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask], whole[mask], rtol=1e-5, atol=1e-5)


def test_padding_has_no_role_also_after_the_given_roles(tiny):
    ids, mask = padded([[5, 6, 7, 8], [9, 10, 11]], left=False)
    recorder = Recorder()
    with edit(tiny, {SITE: recorder}, roles=torch.full((2, 2), PROMPT, dtype=torch.uint8)):
        read(tiny, ids, mask, [SITE])
    assert recorder.seen[0].roles.tolist() == [[PROMPT, PROMPT, RESPONSE, RESPONSE], [PROMPT, PROMPT, RESPONSE, 0]]


def test_the_built_in_model_edits_alike_with_and_without_a_cache(smollm):
    prompt = [{"role": "user", "content": "Name a colour."}]
    ids = smollm.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    push = 40 * torch.nn.functional.normalize(torch.randn(576, generator=torch.Generator().manual_seed(0)), dim=0)
    edits = {Site(15): lambda acts, where: acts + push * (where.positions > 2)[..., None]}
    mask = torch.ones_like(ids)
    cached, uncached = (generate(smollm, ids, mask, edits, max_new_tokens=4, use_cache=on) for on in (True, False))
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, generate(smollm, ids, mask, {}, max_new_tokens=4))
