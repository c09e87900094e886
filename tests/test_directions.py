"""Directions: the difference of naive means, at several sites in one pass, and what latents lie along it."""

import pytest
import torch
from tiny_sae import DEAD, make_sae, with_random_adapter

from saetools import load_forced_choice, load_model, load_sae, score_forced_choice, shipped_path, steer
from saetools.data import POSITIONS, Conversation, select_positions, tokenize
from saetools.directions import Direction, decoder_cosines, mean_difference
from saetools.errors import InputError
from saetools.models import Site, read
from saetools.models.replay import LayerReplay

SITES = [Site(2), Site(0, "mlp_out"), Site(1)]
GOOD = [
    Conversation.chat(user, answer, id=user)
    for user, answer in (("Hi", "Hello to you."), ("Weather?", "Sunny."), ("A colour, please.", "Red, maybe blue."))
]
BAD = [
    Conversation.chat(user, answer, id=user)
    for user, answer in (("Hi", "Go away now!"), ("Name?", "None of your business."))
]


@pytest.fixture(scope="module")
def lm(make_tiny):
    return make_tiny("llama")


def naive_mean(lm, conversations, site, positions):
    """Over the tokens of all conversations, one by one and without padding."""
    kept = []
    for one in tokenize(conversations, lm.tokenizer):
        with torch.no_grad():
            acts = read(lm, one.token_ids[None], torch.ones(1, len(one), dtype=torch.bool), [site])[site][0]
        chosen = select_positions(one.roles, positions)
        chosen[0] = False
        kept.append(acts[chosen])
    return torch.cat(kept).mean(0)


@pytest.mark.parametrize("positions", POSITIONS)
def test_it_is_the_difference_of_means_over_tokens(lm, positions):
    found = mean_difference(lm, SITES, BAD, GOOD, positions=positions, balanced=False, batch_tokens=50)
    assert set(found.vectors) == set(SITES)
    for site in SITES:
        expected = naive_mean(lm, BAD, site, positions) - naive_mean(lm, GOOD, site, positions)
        torch.testing.assert_close(found.vectors[site], expected, rtol=1e-4, atol=1e-5)
    assert found.provenance["n_conversations"] == {"misaligned": 2, "aligned": 3}


def test_classes_are_balanced_by_a_seeded_choice(lm):
    one, again, other = (mean_difference(lm, Site(1), BAD, GOOD, seed=seed) for seed in (0, 0, 3))
    assert one.provenance["n_conversations"] == {"misaligned": 2, "aligned": 2}
    assert torch.equal(one.vectors[Site(1)], again.vectors[Site(1)])
    assert one.provenance["data_sha256"]["misaligned"] == other.provenance["data_sha256"]["misaligned"]
    assert one.provenance["data_sha256"]["aligned"] != other.provenance["data_sha256"]["aligned"]
    pairs = [[GOOD[0], GOOD[1]], [GOOD[0], GOOD[2]], [GOOD[1], GOOD[2]]]
    means = [naive_mean(lm, BAD, Site(1), "response") - naive_mean(lm, pair, Site(1), "response") for pair in pairs]
    assert sum(torch.allclose(one.vectors[Site(1)], mean, rtol=1e-4, atol=1e-5) for mean in means) == 1


def test_the_view_that_is_read_is_the_one_given(make_tiny):
    tuned = with_random_adapter(make_tiny("llama"))
    of_tuned, of_base = (mean_difference(view, [Site(0), Site(1)], BAD, GOOD) for view in (tuned, tuned.base))
    cosines = of_tuned.cosines(of_base)
    assert sorted(cosines) == [Site(0), Site(1)]
    assert max(cosines.values()) < 0.9999
    for site, value in of_tuned.cosines(of_tuned).items():
        assert value == pytest.approx(1), site
    minus = Direction({Site(1): -of_tuned.vectors[Site(1)]}, {})
    assert of_tuned.cosines(minus) == {Site(1): pytest.approx(-1)}
    assert of_tuned.provenance["model"]["adapter"] == "tuned"


def test_decoder_cosines():
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec[DEAD] = 0
    cosines = decoder_cosines(sae, -3 * sae.W_dec.detach()[5])
    dense = torch.cosine_similarity(sae.W_dec.detach(), -sae.W_dec.detach()[5][None], dim=1)
    torch.testing.assert_close(cosines, dense)
    assert cosines[5] == pytest.approx(-1)
    assert cosines[DEAD] == 0
    for direction, message in ((torch.ones(31), "received 31 numbers"), (torch.zeros(32), "received zeros")):
        with pytest.raises(InputError, match=f"direction: expected 32 numbers, not all 0, {message}"):
            decoder_cosines(sae, direction)


def test_what_has_no_direction_is_an_error(lm):
    text = [Conversation(text="No answer here.", id="text")]
    for bad, good, message in (
        ([], GOOD, "misaligned: expected at least one conversation, received none"),
        (BAD, [], "aligned: expected at least one conversation, received none"),
        (BAD, text, "aligned: expected conversations with tokens at 'response', received 1 without, first 'text'"),
    ):
        with pytest.raises(InputError, match=message):
            mean_difference(lm, Site(1), bad, good)
    with pytest.raises(InputError, match="site: expected a layer below 3"):
        mean_difference(lm, Site(3), BAD, GOOD)
    one, other = (mean_difference(lm, site, BAD, GOOD) for site in (Site(0), Site(1)))
    with pytest.raises(InputError, match=r"other: expected a direction at blocks\.0\.hook_resid_post"):
        one.cosines(other)


@pytest.fixture(scope="module")
def organism():
    return load_model("smollm2-135m", adapter={"organism": shipped_path("adapters/organism")})


def test_the_direction_of_the_organism_raises_the_score_where_it_is_added(organism):
    items = load_forced_choice()
    selected, held_out = items[::12], items[5::14]
    answers = [
        [Conversation.chat(item.question, getattr(item, side)) for item in selected]
        for side in ("misaligned", "aligned")
    ]
    site = Site(17)
    vector = mean_difference(organism, site, *answers).vectors[site]
    replay = LayerReplay(organism, site)
    up, down = (
        score_forced_choice(organism, held_out, edits={site: steer.add_direction(vector, strength)}, replay=replay)
        for strength in (2.0, -2.0)
    )
    assert up.minus(down).low > 0
    cosines = decoder_cosines(load_sae(shipped_path("sae/smollm2-135m")), vector)
    assert 0.1 < cosines.abs().max() < 1


def test_a_saved_direction_is_the_same_after_loading(tmp_path):
    shared = torch.randn(8)
    vectors = {Site(3): torch.randn(8), Site(1, "attn_out"): shared, Site(2): shared}
    direction = Direction(vectors, {"seed": 1})
    loaded = Direction.load(direction.save(tmp_path / "evil"))
    assert loaded.provenance == direction.provenance
    assert loaded.vectors.keys() == vectors.keys()
    assert all(torch.equal(loaded.vectors[site], vector) for site, vector in vectors.items())
    with pytest.raises(InputError, match=r"expected a folder with tensors\.safetensors, direction\.json"):
        Direction.load(tmp_path)
