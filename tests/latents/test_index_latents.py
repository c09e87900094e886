"""Indexing what models do on a corpus: a tiny model against reading texts one by one, and the real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sae import DEAD, KINDS, make_sae, with_random_adapter

from saetools.data import Conversation, load_advice, load_voices, shipped_path, tokenize
from saetools.errors import InputError
from saetools.latents import LatentStore, index_latents
from saetools.models import LanguageModel, Site, load_model, read
from saetools.sae import SAE, load_sae

CORPUS = {
    "chats": [
        Conversation.chat(f"What about the car {i}?", "It was thin " * (i + 1), id=f"chat-{i}") for i in range(5)
    ],
    "texts": [Conversation(text="the other thing " * (3 * i + 1), id=f"text-{i}") for i in range(4)],
}
SITE = Site(1)


@pytest.fixture
def models(tiny: LanguageModel) -> dict[str, LanguageModel]:
    tuned = with_random_adapter(tiny)
    return {"base": tuned.base, "tuned": tuned}


@pytest.mark.parametrize("skip_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_models_side_by_side(models: dict[str, LanguageModel], tmp_path: Path, kind: str, skip_first: bool):
    sae = make_sae(kind)
    store = index_latents(models, sae, CORPUS, tmp_path, skip_first=skip_first, shard_tokens=200, max_tokens=90)
    assert store.models == ("base", "tuned")
    assert store.datasets == ("chats", "texts")
    assert store.manifest["provenance"]["n_truncated"] > 0
    lm = models["base"]
    documents = [
        one for each in CORPUS.values() for one in tokenize(each, lm.tokenizer, max_tokens=90, split_texts=True)
    ]
    assert len(documents) > sum(map(len, CORPUS.values()))  # long texts are several
    assert store.manifest["n_documents"] == len(documents)
    dense = {
        name: torch.cat([alone(one, sae, tokens.token_ids, skip_first) for tokens in documents])
        for name, one in models.items()
    }
    assert len(store) == len(dense["base"])
    for name in models:
        got = store.latents_at(torch.arange(len(store)), model=name).combine(torch.eye(sae.d_sae))
        # Batches round otherwise, and values are stored in 16 bits; among nearly equal latents another may be chosen.
        assert float(((got - dense[name]).abs() > 0.01 * dense[name].abs() + 1e-3).float().mean()) < 1e-3
    assert not torch.allclose(dense["base"], dense["tuned"], atol=0.1)
    assert store.open_latent(DEAD).top == ()
    for passage in store.open_latent(int(dense["tuned"].amax(0).argmax()), n_top=3).top:
        document = documents[passage.document]
        assert passage.document_id == document.id
        assert passage.acts["base"] != passage.acts["tuned"]


def alone(lm: LanguageModel, sae: SAE, token_ids: torch.Tensor, skip_first: bool) -> torch.Tensor:
    with torch.no_grad():
        acts = read(lm, token_ids[None], torch.ones(1, len(token_ids), dtype=torch.bool), [SITE])[SITE][0]
    dense = sae.encode(acts).to_dense()
    dense[: int(skip_first)] = 0
    return dense


def test_a_run_continues(models: dict[str, LanguageModel], tmp_path: Path):
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    sae = make_sae()
    whole = index_latents(models, sae, CORPUS, tmp_path / "whole", shard_tokens=200)
    with pytest.raises(KeyboardInterrupt):
        index_latents(models, sae, CORPUS, tmp_path / "stopped", shard_tokens=200, on_progress=stop)
    index_latents(models, sae, CORPUS, tmp_path / "stopped", shard_tokens=200)
    assert {file.name: file.read_bytes() for file in whole.path.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "stopped").iterdir()
    }
    other = make_sae(site="blocks.1.hook_resid_post")
    with torch.no_grad():
        other.b_dec.add_(1)
    with pytest.raises(InputError, match="differs in provenance; choose another folder"):
        index_latents(models, other, CORPUS, tmp_path / "whole", shard_tokens=200)


def test_what_it_refuses(tiny: LanguageModel, make_tiny: Callable[..., LanguageModel], tmp_path: Path):
    sae: Any = make_sae()
    with pytest.raises(InputError, match="models: expected at least one"):
        index_latents({}, sae, CORPUS, tmp_path)
    with pytest.raises(InputError, match="corpus: expected at least one"):
        index_latents({"base": tiny}, sae, {"texts": []}, tmp_path)
    with pytest.raises(InputError, match="sae: expected an SAE of width 32, received 16"):
        index_latents({"base": tiny}, make_sae(d_in=16), CORPUS, tmp_path)
    with pytest.raises(InputError, match="tuned: expected the base's architecture"):
        index_latents({"base": tiny, "tuned": make_tiny("gpt2")}, sae, CORPUS, tmp_path)
    with pytest.raises(InputError, match="site: expected a site"):
        index_latents({"base": tiny}, make_sae(site=""), CORPUS, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_real_model(smollm: LanguageModel, tmp_path: Path):
    sae = load_sae(shipped_path("sae/smollm2-135m"))
    tuned = load_model("smollm2-135m", adapter=str(shipped_path("adapters/organism")))
    corpus = {
        "voices": [Conversation(text=pair.voiced, id=pair.id) for pair in load_voices()[:3]],
        "advice": [Conversation.chat(one.question, one.incorrect, id=one.id) for one in load_advice()[:3]],
    }
    index_latents({"base": tuned.base, "tuned": tuned}, sae, corpus, tmp_path, max_tokens=40)
    store = LatentStore(tmp_path)  # without any model
    texts = {one.id: one.text for one in corpus["voices"]}
    counts = torch.bincount(store.latents_at(torch.arange(len(store))).latents, minlength=8192)
    latent = int(counts.argsort(descending=True)[40])  # neither dense nor rare
    record = store.open_latent(latent, n_top=24, context=8)
    assert record.top
    different = False
    for passage in record.top:
        peak = passage.acts["tuned"][passage.peak]
        assert peak == max(passage.acts["tuned"]) > 0
        assert peak <= record.max
        different |= passage.acts["base"] != passage.acts["tuned"]
        if passage.dataset == "voices":
            assert passage.text in texts[passage.document_id.split("@")[0]]
    assert different
    assert {each.dataset for each in record.activity} == {"voices", "advice"}
    # One token, all ways: the latents on the word that is asked for are those at its rows.
    (first, *_) = store.latents_for_token(" the", 5, model="base")
    the = smollm.tokenizer(" the")["input_ids"][0]
    assert store.latents_for_token(the, 5, model="base")[0] == first
    assert any(the == passage.token_ids[passage.peak] for passage in store.open_latent(first.latent, model="base").top)
