"""Crosscoders: which model has a latent, on planted features and on a real pair."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from planted import D_MODEL, Planted

from saetools.activations import PairedActivations, StoredActivations, StreamedActivations, harvest
from saetools.data import Conversation, load_voices, tokenize
from saetools.errors import InputError
from saetools.models import LanguageModel, Site
from saetools.sae import BatchTopKLoss, Crosscoder, TopKLoss, TrainConfig, load_crosscoder, load_sae, train_crosscoder

N_SHARED, N_ONE = 24, 6
CONFIG = TrainConfig(
    d_sae=48,
    loss=BatchTopKLoss(k=3, k_aux=8),
    n_tokens=1200 * 256,
    batch_size=256,
    lr=3e-3,
    warmup_steps=50,
    dead_after_tokens=10_000,
    encode_dtype="float32",
)


class Pair(Planted):
    """Features that both models have, along other directions in each, and some that only one has.

    The second model is three times as loud.
    """

    def of_models(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Directions in each model; zero where it lacks the feature."""
        first = self.directions.clone()
        generator = torch.Generator().manual_seed(7)
        second = torch.nn.functional.normalize(torch.randn(self.n_features, D_MODEL, generator=generator), dim=1)
        first[N_SHARED + N_ONE :] = 0
        second[N_SHARED : N_SHARED + N_ONE] = 0
        return first, 3 * second

    def epoch_batches(self, batch_size: int, *, seed: int, epoch: int = 0, start: int = 0) -> Iterator[torch.Tensor]:
        for index in range(start, self.n_batches_):
            yield self.draw(batch_size, seed * 1_000_000 + epoch * 1000 + index)

    def draw(self, n_tokens: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        features = torch.rand(n_tokens, self.n_features, generator=generator).topk(self.n_active, dim=1).indices
        strengths = (torch.rand(n_tokens, self.n_active, generator=generator) * 60 + 20)[..., None]
        models = [(strengths * directions[features]).sum(1) for directions in self.of_models()]
        return torch.stack(models, 1) + torch.randn(n_tokens, 2, D_MODEL, generator=generator)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Crosscoder, Path]:
    folder = tmp_path_factory.mktemp("crosscoder")
    return train_crosscoder(Pair(), ["base", "tuned"], CONFIG, folder), folder


def test_it_tells_which_model_has_a_feature(trained: tuple[Crosscoder, Path]):
    crosscoder, _ = trained
    planted = torch.cat([one / max(float(one.norm(dim=1).max()), 1) for one in Pair().of_models()], 1)
    found = torch.cat(list(crosscoder.decoders / torch.tensor([1.0, 3.0])[:, None, None]), 1)
    cosines = torch.nn.functional.normalize(planted, dim=1) @ torch.nn.functional.normalize(found, dim=1).T
    assert cosines.max(1).values.mean() > 0.9
    norms = crosscoder.decoder_norms() / torch.tensor([1.0, 3.0])[:, None]
    share = (norms / norms.sum(0))[1][cosines.argmax(1)]
    assert share[:N_SHARED].sub(0.5).abs().max() < 0.1
    assert share[N_SHARED : N_SHARED + N_ONE].max() < 0.15
    assert share[N_SHARED + N_ONE :].min() > 0.85
    torch.testing.assert_close(crosscoder.relative_norms().sum(0), torch.ones(48))


def test_it_reconstructs_every_model_in_its_own_units(trained: tuple[Crosscoder, Path]):
    crosscoder, _ = trained
    x = Pair().draw(3000, seed=99)
    latents = crosscoder.encode(x)
    recon = crosscoder.decode(latents)
    fvu = (x - recon).square().sum((0, 2)) / (x - x.mean(0)).square().sum((0, 2))
    assert fvu.max() < 0.15
    assert latents.counts().sum() / len(x) == pytest.approx(3, rel=0.2)
    torch.testing.assert_close(torch.cat(list(crosscoder.decoders), 1).norm(dim=1), torch.ones(48))


def test_it_is_saved(trained: tuple[Crosscoder, Path], tmp_path: Path):
    crosscoder, folder = trained
    again = load_crosscoder(folder)
    assert again.models == ("base", "tuned")
    x = Pair().draw(100, seed=98)
    assert torch.equal(again.encode(x).to_dense(), crosscoder.encode(x).to_dense())
    assert load_sae(folder).d_in == 2 * D_MODEL


def test_a_plain_sae_is_none():
    with pytest.raises(InputError, match="path: expected a crosscoder, received an SAE in"):
        load_crosscoder("data/sae/smollm2-135m")


def test_what_cannot_be(trained: tuple[Crosscoder, Path], tmp_path: Path):
    crosscoder, _ = trained
    with pytest.raises(InputError, match=r"config.loss: expected BatchTopKLoss .* received TopKLoss"):
        train_crosscoder(Pair(), ["base", "tuned"], TrainConfig(loss=TopKLoss()), tmp_path)
    with pytest.raises(InputError, match=r"acts: expected \[token, 2 models, 24\], received \(5, 3, 24\)"):
        crosscoder.encode(torch.zeros(5, 3, 24))
    with pytest.raises(InputError, match="models: expected two or more"):
        Crosscoder(crosscoder.sae, ("base",))


def test_a_real_pair_from_stores_and_streams(smollm: LanguageModel, tmp_path: Path):
    site = Site(12)
    texts = list(tokenize([Conversation(text=pair.voiced) for pair in load_voices()[:30]], smollm.tokenizer))
    streamed = PairedActivations([StreamedActivations(smollm, [site], texts, dtype=torch.float32)] * 2)
    stores = [harvest(smollm, [site], texts, tmp_path / name) for name in ("base", "tuned")]
    stored = PairedActivations([StoredActivations(store) for store in stores])
    assert stored.reads == streamed.reads
    assert len(stored) == len(streamed)
    sums = [
        sum(batch[site].float().sum(0) for batch in paired.epoch_batches(8, seed=0)) for paired in (streamed, stored)
    ]
    assert sums[0].shape == (2, 576)
    assert torch.equal(sums[0][0], sums[0][1])
    config = TrainConfig(d_sae=64, loss=BatchTopKLoss(k=4), batch_size=64, n_tokens=64 * 10)
    crosscoder = train_crosscoder(stored.at(site), ["base", "tuned"], config, tmp_path / "crosscoder")
    assert crosscoder.decode(crosscoder.encode(torch.zeros(3, 2, 576))).shape == (3, 2, 576)


def test_sources_of_other_tokens(smollm: LanguageModel):
    texts = list(tokenize([Conversation(text=pair.voiced) for pair in load_voices()[:4]], smollm.tokenizer))
    one, other = (StreamedActivations(smollm, [Site(1)], part) for part in (texts[:2], texts[2:]))
    with pytest.raises(InputError, match=r"sources: expected the same tokens .* received others tokens"):
        PairedActivations([one, other])
    with pytest.raises(InputError, match="sources: expected two or more, received 1"):
        PairedActivations([one])
