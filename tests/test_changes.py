"""Changes: rounding is none; shares of one are without bias from noise, with intervals that hold the truth."""

import math

import pytest
import torch

import saetools
from saetools.changes import FDR, ROUNDING, change_figures, change_p_values, change_tests, projection_share, ranks
from saetools.data import Conversation, tokenize
from saetools.latents.paired import pair_readings
from saetools.latents.reading import read_latents
from saetools.models import Site, load_model
from saetools.significance import false_discovery_rates, mean_p_values, sign_flip_p_values


def share(part, whole, **settings):
    n, d = part.shape
    units, measures = torch.arange(n).repeat_interleave(d), torch.arange(d).repeat(n)
    settings = {"n_measures": d, "n_units": n, "n_resamples": 200, "seed": 0, **settings}
    return projection_share(part.flatten(), whole.flatten(), measures, units, **settings)


def drawn(seed, noise):
    """A part of 0.3 and a rest of 0.1 on each of 200 measures; the share is 0.75."""
    generator = torch.Generator().manual_seed(seed)
    part = 0.3 + noise * torch.randn(24, 200, generator=generator)
    rest = 0.1 + 2 * noise * torch.randn(24, 200, generator=generator)
    return part, part + rest


def test_noise_neither_biases_the_share_nor_escapes_the_interval():
    found = [share(*drawn(seed, 0.5)) for seed in range(150)]
    mean = sum(one.mean for one in found) / 150
    plugged = [
        part.mean(0) @ whole.mean(0) / whole.mean(0).square().sum()
        for part, whole in (drawn(s, 0.5) for s in range(150))
    ]
    assert abs(mean - 0.75) < 0.02
    assert abs(float(sum(plugged)) / 150 - 0.75) > 0.05  # what products of a unit with itself would do
    held = sum(one.low <= 0.75 <= one.high for one in found) / 150
    assert 0.88 < held < 0.99


def test_a_share_without_noise_is_exact():
    part, whole = drawn(0, 0.0)
    found = share(part, whole)
    assert (found.mean, found.low, found.high) == pytest.approx((0.75, 0.75, 0.75))
    assert share(-part, whole).mean == pytest.approx(-0.75)


def test_no_more_change_than_noise_has_no_share():
    noise = [torch.randn(24, 200, generator=torch.Generator().manual_seed(seed)) for seed in range(10)]
    found = [share(one, one) for one in noise]
    assert 0 < sum(math.isnan(one.mean) for one in found) < 10
    assert all(math.isnan(one.low) and math.isnan(one.high) for one in found)


def test_measures_in_several_parts_are_those_of_all_together(monkeypatch):
    together = share(*drawn(1, 0.5))
    monkeypatch.setattr("saetools.changes._CHUNK", 7)
    assert share(*drawn(1, 0.5)).mean == pytest.approx(together.mean)


def test_ranks_of_equal_values_keep_their_order():
    assert ranks(torch.tensor([1.0, 5.0, 1.0, -2.0])).tolist() == [2, 1, 3, 4]


def test_changes_as_small_as_rounding_do_not_count():
    generator = torch.Generator().manual_seed(0)
    n, d = 20, 6
    sizes = 1 + torch.rand(d, n, generator=generator)
    sizes[:, 0] = torch.tensor([2.0, 4.0, 8.0, 2.0, 2.0, 0.0])  # the largest of each
    shares = torch.tensor([0.9, 0.9, 1.1, 1e3, 0.9, 0.0]) * ROUNDING
    changes = shares[:, None] * sizes[:, :1].expand(d, n)
    changes[4, :12] *= 100
    sizes[5], changes[5] = 0, 0
    measures = torch.arange(d).repeat_interleave(n)
    p = change_p_values(changes.flatten(), sizes.flatten(), measures, d)
    every, some = 2.0 ** (1 - n), 2.0 ** (1 - 12)
    assert p.tolist() == pytest.approx([1.0, 1.0, every, every, some, 1.0])
    assert sign_flip_p_values(changes.flatten(), measures, d).tolist()[:5] == pytest.approx([every] * 5)


def test_only_what_is_tested_counts_for_the_false_discovery_rate():
    values = torch.randn(8 * 15, generator=torch.Generator().manual_seed(0)) + 1
    measures = torch.arange(8).repeat_interleave(15)
    tested = torch.arange(8) % 3 > 0
    found = change_tests(values, values.abs(), measures, tested)
    p = mean_p_values(values, measures, 8)
    torch.testing.assert_close(found["p_value"][tested], p[tested])
    torch.testing.assert_close(found["q_value"][tested], false_discovery_rates(p[tested]))
    assert all(bool(each[~tested].isnan().all()) for each in found.values())


def test_a_model_does_not_change_by_being_computed_otherwise():
    """An adapter against the same adapter merged into the weights, in other batches."""
    adapted = load_model("smollm2-135m", adapter=saetools.shipped_path("adapters/organism"))
    merged = load_model("smollm2-135m")
    with torch.no_grad():
        for name, layer in adapted.model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                weight = merged.model.get_submodule(name.removeprefix("base_model.model.")).weight
                weight += layer.get_delta_weight(next(iter(layer.lora_A)))
    sae = saetools.load_sae(saetools.shipped_path("sae/smollm2-135m"))
    texts = [Conversation.chat(one.question) for one in saetools.load_forced_choice()[:20]]
    tokenized = list(tokenize(texts, adapted.tokenizer))

    first, second = (
        read_latents(lm, sae, Site(17), tokenized, ["prompt"], batch_tokens=batch_tokens)["prompt"]
        for lm, batch_tokens in ((adapted, 4096), (merged, 100))
    )
    pairs = pair_readings(first, second)
    tested = torch.bincount(pairs.latent, minlength=sae.d_sae) >= 10
    assert tested.sum() > 100
    assert 0 < pairs.changes().abs().max() < 1e-3
    q_values = change_tests(pairs.changes(), pairs.sizes(), pairs.latent, tested)["q_value"]
    assert (q_values[tested] > FDR).all()
    flips = sign_flip_p_values(pairs.changes(), pairs.latent, sae.d_sae)
    assert (false_discovery_rates(flips[tested]) <= FDR).any()  # without a floor, rounding is a change


def test_too_few_changes_for_an_interval():
    generator = torch.Generator().manual_seed(0)
    n = 40
    n_active = torch.tensor([0, 1, 2, 12])
    units = torch.cat([torch.randperm(n, generator=generator)[:k] for k in n_active.tolist()])
    measures = torch.arange(4).repeat_interleave(n_active)
    values = torch.rand(len(units), generator=generator) + 0.5
    found = change_figures(values, measures, units, n_measures=4, n_units=n, n_resamples=1000, seed=0)
    assert found["low"].isnan().tolist() == found["high"].isnan().tolist() == [False, True, True, False]
    assert (found["low"][0], found["high"][0]) == (0, 0)
    assert 0 < found["low"][3] < found["delta"][3] < found["high"][3]
    assert all(bool(found[name].isfinite().all()) for name in ("delta", "se", "effect"))
