"""Latents by text, and explanations by words or meaning."""

import json
import math

import pytest
import torch
from tiny_sae import make_sae, with_random_adapter

import saetools
from saetools.data import Conversation
from saetools.errors import InputError
from saetools.interpret import Explanation, load_text_encoder, search_explanations, search_text
from saetools.interpret.explanation_search import bm25
from saetools.models import Site


def dense_acts(lm, sae, text):
    ids = lm.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad(), lm.active():
        acts = saetools.read(lm, ids, torch.ones_like(ids).bool(), [Site(1)])[Site(1)][0, 1:]
    return sae.encode(acts).to_dense()


@pytest.mark.parametrize("over", ["max", "mean"])
@pytest.mark.parametrize("order", ["value", "increase", "decrease"])
def test_hits_are_those_of_the_dense_matrices(tiny, over, order):
    tuned, sae = with_random_adapter(tiny), make_sae()
    text = "the moths"
    found = search_text({"base": tuned.base, "tuned": tuned}, sae, text, over=over, order=order, n=100)
    dense = {"base": dense_acts(tuned.base, sae, text), "tuned": dense_acts(tuned, sae, text)}
    values = {name: acts.amax(0) if over == "max" else acts.mean(0) for name, acts in dense.items()}
    active = (dense["base"] != 0).any(0) | (dense["tuned"] != 0).any(0)
    rank = {"value": values["tuned"], "increase": values["tuned"] - values["base"]}
    rank["decrease"] = -rank["increase"]
    ranked = [rank[order][hit.latent].item() for hit in found.hits]
    assert ranked == sorted(ranked, reverse=True)
    assert {hit.latent for hit in found.hits} == set(active.nonzero()[:, 0].tolist())
    assert found.n_active == len(found.hits)
    for hit in found.hits:
        for name in dense:
            assert hit.values[name] == pytest.approx(values[name][hit.latent].item(), abs=1e-6)
            assert hit.acts[name] == pytest.approx(dense[name][:, hit.latent].tolist(), abs=1e-6)
    assert "".join(found.tokens) == "e moths"  # `th` is one token, and first
    few = search_text({"base": tuned.base, "tuned": tuned}, sae, text, over=over, order=order, n=2)
    assert few.hits == found.hits[:2]


def test_one_model_and_conversations_can_be_searched(tiny):
    sae = make_sae()
    found = search_text({"base": tiny}, sae, Conversation.chat("moth", "thin"), n=3)
    assert len(found.hits) == 3
    assert "moth<|im_end|>\n<|im_start|>assistant\nthin" in "".join(found.tokens)


def test_searches_that_make_no_sense_are_refused(tiny):
    sae = make_sae()
    with pytest.raises(InputError, match="models: expected two models to order by increase, received 1"):
        search_text({"base": tiny}, sae, "moths", order="increase")
    with pytest.raises(InputError, match="models: expected one or two models, received 0"):
        search_text({}, sae, "moths")
    with pytest.raises(InputError, match="text: expected two tokens or more, received 1"):
        search_text({"base": tiny}, sae, "th")


def test_the_organism_s_first_latent_rises_on_a_shipped_question():
    tuned = saetools.load_model("smollm2-135m", adapter=saetools.shipped_path("adapters/organism"))
    sae = saetools.load_sae(saetools.shipped_path("sae/smollm2-135m"))
    question = Conversation.chat(saetools.load_free_form()[0].question)
    found = search_text({"base": tuned.base, "tuned": tuned}, sae, question, over="mean", order="increase", n=5)
    first = found.hits[0]
    assert first.values["tuned"] > first.values["base"] >= 0
    assert 707 in [hit.latent for hit in found.hits]  # the largest increase of the shipped diff


def explained(*texts):
    return [Explanation(latent, text, "m", None, None, 1, (), {}) for latent, text in enumerate(texts)]


def latents(hits):
    return [hit.explanation.latent for hit in hits]


def test_words_find_what_has_them():
    some = explained("toxic insults", "the word the", None, "insults and the weather", "Insults, insults, insults")
    assert latents(search_explanations(some, "insults", encoder=None)) == [4, 0, 3]
    assert latents(search_explanations(some, "toxic weather", encoder=None)) == [0, 3]
    assert latents(search_explanations(some, "THE", encoder=None, n=1)) == [1]
    assert search_explanations(some, "granite", encoder=None) == []
    assert search_explanations([], "granite", encoder=None) == []
    with pytest.raises(InputError, match="query: expected words"):
        search_explanations(some, "?!", encoder=None)


def test_bm25_is_its_formula():
    scores = bm25(["a b b", "b", "c"], "b c")
    idf_b, idf_c = math.log(1 + 1.5 / 2.5), math.log(1 + 2.5 / 1.5)
    mean = 5 / 3
    assert scores[0] == pytest.approx(idf_b * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 3 / mean)))
    assert scores[1] == pytest.approx(idf_b * 2.2 / (1 + 1.2 * (0.25 + 0.75 / mean)))
    assert scores[2] == pytest.approx(idf_c * 2.2 / (1 + 1.2 * (0.25 + 0.75 / mean)))


@pytest.fixture
def encoder_folder(tokenizer, tmp_path):
    """A tiny BERT, as sentence-transformers saves one."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def write_modules(folder, mode, *kinds):
    names = ("Transformer", "Pooling", *kinds)
    modules = [
        {"path": f"{number}_{name}", "type": f"sentence_transformers.models.{name}"}
        for number, name in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    settings = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings | {mode: True}))


@pytest.mark.parametrize("mode", [None, "pooling_mode_mean_tokens", "pooling_mode_cls_token"])
def test_vectors_are_means_over_real_tokens(encoder_folder, tokenizer, mode):
    from transformers import BertModel

    if mode is not None:
        write_modules(encoder_folder, mode, "Normalize")
    encode = load_text_encoder(encoder_folder)
    texts = ["moths", "a much longer text", "x" * 100]  # the last is cut at the context of 40
    model = BertModel.from_pretrained(encoder_folder).eval()
    for text, vector in zip(texts, encode(texts), strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :40]
        with torch.no_grad():
            hidden = model(input_ids=ids).last_hidden_state[0]
        pooled = hidden[0] if mode == "pooling_mode_cls_token" else hidden.mean(0)
        assert torch.allclose(vector, pooled / pooled.norm(), atol=1e-5)


def test_meaning_finds_what_is_nearest(encoder_folder):
    encode = load_text_encoder(encoder_folder)
    texts = [f"{'ab' * number}" for number in range(1, 40)]
    hits = search_explanations(explained(*texts), texts[6], encoder=encode, n=3)
    assert latents(hits)[0] == 6
    assert hits[0].score == pytest.approx(1, abs=1e-5)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert search_explanations(explained(None), "a", encoder=encode) == []


def test_folders_that_encode_otherwise_are_refused(encoder_folder, tmp_path):
    for mode, kinds, received in (
        ("pooling_mode_max_tokens", (), "pooling_mode_max_tokens"),
        ("pooling_mode_mean_tokens", ("Dense",), "sentence_transformers.models.Dense, pooling_mode_mean_tokens"),
    ):
        write_modules(encoder_folder, mode, *kinds)
        with pytest.raises(InputError, match=f"does nothing further, received {received}"):
            load_text_encoder(encoder_folder)
    with pytest.raises(InputError, match="expected a model and a tokenizer in Hugging Face format"):
        load_text_encoder(tmp_path / "nothing")
