"""From a latent store to explanations."""

import pytest
from fake_endpoint import fake_server
from tiny_sae import make_sae, with_random_adapter

from saetools.data import Conversation
from saetools.endpoint import Endpoint
from saetools.interpret import ExplainConfig, explain_latents, store_passages
from saetools.latents import index_latents


def guess(_number, request):
    n = request["messages"][0]["content"].count('. "')
    return "[" + ", ".join("10"[number % 2] for number in range(n)) + "]" if n else '{"explanation": "something"}'


@pytest.mark.parametrize("model", ["base", "tuned"])
def test_a_store_gives_what_explanations_need(tiny, tmp_path, model):
    tuned, sae = with_random_adapter(tiny), make_sae()
    words = ["moth", "thin", "stone", "river", "cloud", "the", "sea", "bath"]
    texts = [f"{words[i % 8]} {words[i // 8]} {words[(3 * i) % 8]}" for i in range(48)]
    corpus = {"made": [Conversation(text=text, id=f"text {number}") for number, text in enumerate(texts)]}
    store = index_latents({"base": tuned.base, "tuned": tuned}, sae, corpus, tmp_path / "store")
    passages = store_passages(store, model=model, context=2)
    found = {latent: passages(latent) for latent in range(12)}
    for one in found.values():
        assert all(max(map(abs, each.acts[model])) > 0 for each in one.active)
        assert not any(any(each.acts[model]) for each in one.inactive)
        assert all(len(each.tokens) <= 5 for each in one.active + one.inactive)
    latents = [latent for latent, one in found.items() if min(len(one.active), len(one.inactive)) > 10]
    with fake_server(guess) as server:
        endpoint = Endpoint(server.url, "judge", max_retries=0)
        config = ExplainConfig(n_shown=4, n_scored=5)
        run = explain_latents(latents[:2], passages, endpoint, acts_of=model, config=config)
    for one in run.explanations:
        assert one.text == "something"
        assert one.detection is not None
        assert one.provenance["acts_of"] == model
