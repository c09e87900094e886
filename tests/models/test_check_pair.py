import copy
import dataclasses
import warnings

import pytest

from saetools.errors import InputError, SaetoolsWarning
from saetools.models import check_pair, load_model

TEXTS = ["<|im_start|>user\nthe cat<|im_end|>\n", "more of the same"]


@pytest.fixture
def twin(make_tiny):
    return make_tiny("llama")


def with_tokenizer(lm, **changes):
    tokenizer = copy.deepcopy(lm.tokenizer)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return dataclasses.replace(lm, tokenizer=tokenizer)


def test_a_model_fits_itself_and_its_fine_tune(tiny, twin):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_pair(tiny, tiny.base, TEXTS)
        check_pair(tiny, twin, TEXTS)


@pytest.mark.parametrize(
    ("family", "overrides", "received"),
    [
        ("llama", {"hidden_size": 48, "head_dim": 12}, "llama, 48, 3"),
        ("llama", {"num_hidden_layers": 2}, "llama, 32, 2"),
        ("qwen2", {}, "qwen2, 32, 3"),
    ],
)
def test_other_shapes_are_errors(tiny, make_tiny, family, overrides, received):
    with pytest.raises(InputError, match=f"tuned: expected .*llama, 32, 3, received {received}; compare a model"):
        check_pair(tiny, make_tiny(family, **overrides))


def test_other_token_ids_are_errors(tiny, twin):
    tokenizer = copy.deepcopy(twin.tokenizer)
    tokenizer.add_tokens(["cat"])
    other = load_model(twin, tokenizer=tokenizer)
    check_pair(tiny, other, TEXTS[1:])
    with pytest.raises(
        InputError, match=r"tuned: expected a tokenizer that gives the base's token ids.*the cat.*tokenizer="
    ):
        check_pair(tiny, other, TEXTS)
    same_weights = dataclasses.replace(tiny, tokenizer=tokenizer)
    with pytest.raises(InputError, match="other ids"):
        check_pair(tiny, same_weights, TEXTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lm, make: make("llama", vocab_size=264), "vocabulary rows: 260 against 264"),
        (
            lambda lm, make: with_tokenizer(lm, pad_token="<|im_end|>"),
            r"pad token: '<\|endoftext\|>' against '<\|im_end\|>'",
        ),
        (lambda lm, make: with_tokenizer(lm, chat_template="{{ messages }}"), "chat template"),
    ],
    ids=["vocabulary", "pad", "template"],
)
def test_small_differences_are_warnings(tiny, twin, make_tiny, change, message):
    with pytest.warns(SaetoolsWarning, match=f"base and tuned differ in {message}; the base's tokenizer and template"):
        check_pair(tiny, change(twin, make_tiny), TEXTS)
