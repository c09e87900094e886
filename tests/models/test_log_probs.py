import pytest
import torch

from saetools.errors import InputError
from saetools.generation import SamplingConfig, generate
from saetools.models import Site, final_hidden, log_probs, logits, read, token_log_probs
from saetools.models.forward import _HEAD_CHUNK

IDS = torch.randint(0, 200, (3, 8), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[True] * 8, [False] * 3 + [True] * 5, [True] * 6 + [False] * 2])
SCORED = torch.zeros(3, 8, dtype=torch.bool)
SCORED[0, 1:4] = SCORED[1, 5:] = SCORED[2, 5] = True

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def head_inputs(family_lm):
    """How many tokens each call of the head got."""
    sizes = []
    hook = family_lm.head.register_forward_hook(lambda _module, args, _out: sizes.append(args[0].shape[:-1].numel()))
    yield sizes
    hook.remove()


def test_they_are_the_log_softmax_of_all_logits_without_ever_making_those(family_lm, head_inputs):
    found = token_log_probs(family_lm, IDS, MASK, SCORED)
    assert head_inputs == [SCORED.sum()]
    positions = (MASK.long().cumsum(1) - 1).clamp(min=0)
    full = family_lm.model(IDS, attention_mask=MASK.long(), position_ids=positions).logits
    of_next = full[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, of_next[SCORED[:, 1:]], rtol=1e-5, atol=1e-5)
    if getattr(family_lm.model.config.get_text_config(), "final_logit_softcapping", None):
        assert full.abs().max() < family_lm.logit_cap
        assert family_lm.head(final_hidden(family_lm, IDS, MASK)).abs().max() > full.abs().max()


def test_the_head_sees_one_chunk_at_a_time(tiny):
    hidden = torch.randn(2 * _HEAD_CHUNK + 5, 32, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 260, (len(hidden),), generator=torch.Generator().manual_seed(1))
    sizes = []
    tiny.head.register_forward_hook(lambda _module, args, _out: sizes.append(len(args[0])))
    found = log_probs(tiny, hidden, targets)
    assert sizes == [_HEAD_CHUNK, _HEAD_CHUNK, 5]
    expected = logits(tiny, hidden).log_softmax(-1)[torch.arange(len(hidden)), targets]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert log_probs(tiny, hidden[:0], targets[:0]).shape == (0,)


def test_they_are_float32_for_half_precision_models(make_tiny):
    lm = make_tiny("llama")
    lm.model.bfloat16()
    assert token_log_probs(lm, IDS, MASK, SCORED).dtype == torch.float32


@pytest.mark.parametrize(
    "where", [(0, 0), (1, 3), (1, 2), (2, 6)], ids=["first column", "first token", "left", "right"]
)
def test_tokens_that_nothing_predicts_are_errors(tiny, where):
    scored = SCORED.clone()
    scored[where] = True
    with pytest.raises(InputError, match="scored: expected tokens with a token before them"):
        token_log_probs(tiny, IDS, MASK, scored)


def test_the_built_in_model_prefers_the_right_capital(smollm):
    ids = smollm.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    hidden = final_hidden(smollm, ids, torch.ones_like(ids, dtype=torch.bool))[0, -1:]
    paris, rome = (torch.tensor(smollm.tokenizer(f" {city}")["input_ids"]) for city in ("Paris", "Rome"))
    assert log_probs(smollm, hidden, paris) > log_probs(smollm, hidden, rome)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_longer_than_the_context_is_an_error(make_tiny, family):
    lm = make_tiny(family)
    n = lm.n_context
    ids = torch.zeros(1, n + 1, dtype=torch.long)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        assert final_hidden(lm, ids[:, :n], mask[:, :n]).shape[1] == n
        with pytest.raises(
            InputError, match=f"token_ids: expected at most {n} tokens, the context of .*received {n + 1}"
        ):
            final_hidden(lm, ids, mask)
        with pytest.raises(InputError, match="token_ids: expected at most"):
            read(lm, ids, mask, [Site(0)])
        mask[0, 0] = False  # padding does not count
        assert final_hidden(lm, ids, mask).shape[1] == n + 1
    with pytest.raises(InputError, match=r"prompts and config\.max_new_tokens: expected at most"):
        generate(lm, ["Hi"], config=SamplingConfig(max_new_tokens=n))
