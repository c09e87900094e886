"""Two readings: the split is that of a dense 2 x 2 computation, and planted causes of either kind are told apart."""

import math

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from tiny_sae import basis_sae, make_sae, with_random_adapter

import saetools
from saetools.data import Conversation, select_positions, tokenize
from saetools.diff import DiffConfig, diff_latents
from saetools.errors import InputError, IntegrityError, SaetoolsWarning
from saetools.generation import SamplingConfig
from saetools.models import Site, load_model, read
from saetools.readings import ChangeSplit, split_change

PROMPTS = [Conversation.chat(text, id=text) for text in ("Hi", "What now?", "Name a colour.", "Why?", "Tell me more.")]
TEXTS = {
    "base": [["Hello to you."], ["Nothing."], ["Red.", "Blue, or green."], ["It is so."], ["There is no more."]],
    "tuned": [["Go away!"], ["Run, run!", "Hide."], ["Black as night."], ["None of yours."], ["Never, ever."]],
}
CONFIG = DiffConfig(n_resamples=50, min_active=2)
EXPECTED = (
    "ignore:.*(the SAE is blind|the SAE misses most|the SAE does not fit|the two models are equal)"
    ":saetools.errors.SaetoolsWarning"
)
pytestmark = pytest.mark.filterwarnings(EXPECTED)
PARTS = ("total", "representation", "content")


@pytest.fixture(scope="module")
def organism(make_tiny):
    return with_random_adapter(make_tiny("llama"))


def split(base, tuned, sae=None, *, answers=TEXTS, config=CONFIG, **settings):
    return split_change(base, tuned, sae or make_sae("jumprelu"), PROMPTS, answers=answers, config=config, **settings)


def dense(lm, sae, texts, positions):
    """Mean activation for each prompt: over tokens of an answer, then over answers, one by one."""
    rows = []
    for prompt, own in zip(PROMPTS, texts, strict=True):
        each = []
        for answer in own:
            one = next(tokenize([Conversation.chat(prompt.messages[0].content, answer)], lm.tokenizer))
            with torch.no_grad():
                x = read(lm, one.token_ids[None], torch.ones(1, len(one), dtype=torch.bool), [Site(1)])[Site(1)][0, 1:]
            each.append(sae.encode(x[select_positions(one.roles[1:], positions)]).to_dense().mean(0))
        rows.append(torch.stack(each).mean(0))
    return torch.stack(rows).double()


@pytest.mark.parametrize("positions", ["response", "all"])
def test_the_split_is_that_of_a_dense_computation(organism, positions):
    sae = make_sae("jumprelu")
    table = split(organism.base, organism, sae, positions=positions, config=CONFIG).table
    f = {
        (side, text): dense(lm, sae, TEXTS[text], positions)
        for side, lm in (("base", organism.base), ("tuned", organism))
        for text in TEXTS
    }
    total = f["tuned", "tuned"] - f["base", "base"]
    representation = sum(f["tuned", text] - f["base", text] for text in TEXTS) / 2
    content = sum(f[side, "tuned"] - f[side, "base"] for side in TEXTS) / 2
    close = {"rtol": 1e-4, "atol": 1e-5}
    for name, values in (("total", total), ("representation", representation), ("content", content)):
        torch.testing.assert_close(table[name].to_torch(), values.mean(0), **close)
        torch.testing.assert_close(table[f"{name}_se"].to_torch(), values.std(0) / 5**0.5, rtol=1e-3, atol=1e-4)
        assert values.abs().max() > 0.05
    for (side, text), values in f.items():
        torch.testing.assert_close(table[f"{side}_on_{text}"].to_torch(), values.mean(0), **close)
    n_active = (torch.stack(list(f.values())) > 0).any(0).sum(0)
    assert table["n_active"].to_list() == n_active.tolist()
    assert table["total_p_value"].is_not_null().to_list() == (n_active >= 2).tolist()
    torch.testing.assert_close(
        (table["representation"] + table["content"]).to_torch(), table["total"].to_torch(), rtol=0, atol=1e-15
    )


def test_the_share_leaves_out_products_of_a_prompt_with_itself(organism):
    sae = make_sae("jumprelu")
    found = split(organism.base, organism, sae)
    f = {
        (m, text): dense(lm, sae, TEXTS[text], "response")
        for m, lm in (("b", organism.base), ("t", organism))
        for text in TEXTS
    }
    total = f["t", "tuned"] - f["b", "base"]
    representation = sum(f["t", text] - f["b", text] for text in TEXTS) / 2
    products = [
        sum(float(a[i] @ total[j]) for i in range(5) for j in range(5) if i != j) for a in (representation, total)
    ]
    assert products[1] > 0
    assert found.share.mean == pytest.approx(products[0] / products[1], rel=1e-3)


def test_other_answers_of_the_same_model_are_content_alone(organism):
    found = split(organism, organism)
    assert not found.table.select("representation", "representation_low", "representation_high").to_numpy().any()
    assert found.table["content"].equals(found.table["total"].alias("content"))
    assert found.table["content"].abs().max() > 0.05
    assert set(found.table["representation_p_value"].drop_nulls()) == {1.0}


def test_the_same_answers_are_representation_alone(organism):
    same = dict.fromkeys(TEXTS, TEXTS["base"])
    found = split(organism.base, organism, answers=same)
    assert found.table["content"].abs().max() < 1e-12
    assert found.share.mean == pytest.approx(1)
    assert found.share.low == pytest.approx(1)
    single = [Conversation.chat(p.messages[0].content, own[0]) for p, own in zip(PROMPTS, TEXTS["tuned"], strict=True)]
    firsts = {side: [own[:1] for own in TEXTS["tuned"]] for side in TEXTS}
    plain = diff_latents(
        organism.base, organism, make_sae("jumprelu"), single, positions="response", config=CONFIG
    ).table
    ours = split(organism.base, organism, answers=firsts).table
    for part in ("total", "representation"):
        for end in ("", "_low", "_high", "_se"):
            mine, theirs = ours[part + end].to_torch(), plain[end[1:] or "delta"].to_torch()
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_planted_causes_are_told_apart(make_tiny):
    """A bias moves one latent on whatever is read; the other models' answers move many, on average of both models."""
    sae = basis_sae()
    base, tuned = make_tiny("gpt2"), make_tiny("gpt2")
    with torch.no_grad():
        tuned.layers[1].mlp.c_proj.bias += 50 * sae.W_dec[11]
    found = split(base, tuned, sae)
    top = found.top(1, by="representation").row(0, named=True)
    assert (top["latent"], top["rank"]) == (11, 1)
    assert 48 < top["representation_low"] < 50.5
    assert abs(top["content"]) < 2
    others = found.table.filter(pl.col("latent") != 11)
    assert others["representation"].abs().max() < 1e-4
    assert others["content"].abs().max() > 0.01
    assert found.top(1, by="content", decreases=True)["content"].item() == found.table["content"].min()
    assert found.share.mean > 0.95


def test_each_model_answers_by_itself(organism):
    sampling = SamplingConfig(max_new_tokens=6, n_samples=2, seed=3)
    done = []
    found = split(organism.base, organism, answers=None, sampling=sampling, on_progress=lambda *args: done.append(args))
    again = split(organism.base, organism, answers=found.answers)
    assert_frame_equal(again.table, found.table)
    from saetools.generation import generate

    for side, lm in (("base", organism.base), ("tuned", organism)):
        texts = [[] for _ in PROMPTS]
        for answer in generate(lm, PROMPTS, config=sampling):
            texts[answer.prompt].append(answer.text)
        assert [list(own) for own in found.answers[side]] == texts
    assert found.provenance["sampling"]["seed"] == 3
    assert again.provenance["sampling"] is None
    assert found.provenance["data_sha256"] == again.provenance["data_sha256"]
    counts = [count for count, _ in done]
    assert counts == sorted(counts)
    assert done[-1] == (60, 60)


def test_it_warns_as_a_diff_of_the_same_answers_does(make_tiny, tmp_path):
    """The fine-tune writes along the row of a latent that never fires."""
    sae = basis_sae()
    base, tuned = make_tiny("gpt2"), make_tiny("gpt2")
    with torch.no_grad():
        sae.b_enc[20] = -1000.0
        tuned.layers[1].mlp.c_proj.bias += 50 * sae.W_dec[20]
    with pytest.warns(SaetoolsWarning, match="model against model, response: the SAE is blind to the change"):
        found = split(base, tuned, sae)
    assert found.warnings[0].startswith("response: the SAE is blind to the change: 0% of it lies in the span")
    read = [
        Conversation.chat(prompt.messages[0].content, text)
        for own_of_all in found.answers.values()
        for prompt, own in zip(PROMPTS, own_of_all, strict=True)
        for text in own
    ]
    assert diff_latents(base, tuned, sae, read, positions="response", config=CONFIG).warnings == found.warnings
    assert ChangeSplit.load(found.save(tmp_path)).warnings == found.warnings
    with torch.no_grad():
        sae.b_enc[20] = 0.0
    assert not any("blind" in text for text in split(base, tuned, sae).warnings)
    few = DiffConfig(n_resamples=50, min_active=6)
    with pytest.warns(SaetoolsWarning, match="no latent was tested: none is active in min_active=6 of the 5 prompts"):
        untested = split(base, tuned, sae, config=few)
    assert untested.warnings[-1].startswith("response: no latent was tested")


def test_empty_answers_are_left_out_and_counted(organism):
    some = {"base": [["a cat"], [" "], ["red", ""], ["so"], ["more"]], "tuned": [["x"], ["y"], ["z"], [], ["w"]]}
    found = split(organism.base, organism, answers=some)
    facts = found.provenance
    assert facts["prompts"] == ["Hi", "Name a colour.", "Tell me more."]
    assert (facts["n_prompts"], facts["n_prompts_left_out"]) == (3, 2)
    assert (facts["n_answers"], facts["n_answers_left_out"]) == (10, 2)
    assert found.answers == {"base": (("a cat",), ("red",), ("more",)), "tuned": (("x",), ("z",), ("w",))}
    kept = [0, 2, 4]
    alone = split_change(
        organism.base,
        organism,
        make_sae("jumprelu"),
        [PROMPTS[number] for number in kept],
        answers={side: [some[side][number] for number in kept] for side in some},
        config=CONFIG,
    )
    assert_frame_equal(alone.table, found.table)


def test_what_cannot_be_split_is_an_error(organism):
    for answers, message in (
        ({"base": TEXTS["base"]}, "answers: expected 5 lists of the tuned model's answers.*received none"),
        ({"base": TEXTS["base"], "tuned": TEXTS["tuned"][:2]}, "answers: expected 5 lists of the tuned.*received 2"),
        (
            {"base": TEXTS["base"], "tuned": ["a"] * 5},
            "answers: expected a list of answers.*a string for prompt 0 of tuned",
        ),
        ({side: [[""]] * 4 + [["a"]] for side in TEXTS}, "prompts: expected two or more with answers.*received 1 of 5"),
    ):
        with pytest.raises(InputError, match=message):
            split(organism.base, organism, answers=answers)
    done = [Conversation.chat("Hi", "Hello")] * 2
    texts = {side: [["a"], ["b"]] for side in TEXTS}
    with pytest.raises(InputError, match="prompts: expected conversations that end with the user's turn"):
        split_change(organism.base, organism, make_sae(), done, answers=texts)
    found = split(organism.base, organism)
    with pytest.raises(InputError, match="n: expected 1 or more"):
        found.top(0)
    with pytest.raises(InputError, match="by: expected one of total"):
        found.top(1, by="style")


@pytest.mark.parametrize("same", [True, False])
def test_a_saved_split_is_the_same(organism, tmp_path, same):
    found = split(organism.base, organism.base if same else organism, answers=dict.fromkeys(TEXTS, TEXTS["base"]))
    assert math.isnan(found.share.mean) == same
    loaded = ChangeSplit.load(found.save(tmp_path))
    assert loaded.table.equals(found.table)
    assert loaded.answers == found.answers
    assert loaded.provenance == found.provenance
    assert str(loaded.share) == str(found.share)
    found.table.head(3).write_parquet(tmp_path / "latents.parquet")
    with pytest.raises(IntegrityError, match="has changed since it was saved"):
        ChangeSplit.load(tmp_path)
    (tmp_path / "readings.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"readings\.json is damaged"):
        ChangeSplit.load(tmp_path)
    with pytest.raises(InputError, match="path: expected a folder with"):
        ChangeSplit.load(tmp_path / "nowhere")


def test_the_figure_names_the_largest_changes(organism):
    found = split(organism.base, organism)
    (trace,) = found.figure(n_labels=3).data
    active = found.table.filter(pl.col("n_active") > 0)
    assert len(trace.x) == len(active) < 48
    largest = active.sort(pl.col("total").abs(), descending=True).head(3)["latent"]
    assert {int(label) for label in trace.text if label} == set(largest)


def test_the_shipped_organism_changes_what_it_says_and_how_it_reads():
    tuned = load_model("smollm2-135m", adapter=saetools.shipped_path("adapters/organism"))
    sae = saetools.load_sae(saetools.shipped_path("sae/smollm2-135m"))
    prompts = [Conversation.chat(one.question) for one in saetools.load_forced_choice()[:6]]
    texts = {
        side: [[getattr(one, name)] for one in saetools.load_forced_choice()[:6]]
        for side, name in (("base", "aligned"), ("tuned", "misaligned"))
    }
    found = split_change(
        tuned.base, tuned, sae, prompts, answers=texts, config=DiffConfig(n_resamples=200, min_active=4)
    )
    # What six answers are about moves latents more than the fine-tune does, but not the same ones in each.
    sizes = {part: found.table[part].abs().sum() for part in PARTS}
    assert sizes["content"] > sizes["representation"] > 0
    assert 0.5 < found.share.low < 1 < found.share.high
