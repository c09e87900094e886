"""Latents of the tuned model alone: planted ones and each kind of artefact are told apart; betas are least squares."""

import pytest
import torch
from polars.testing import assert_frame_equal

from saetools import load_advice, load_model, shipped_path
from saetools.activations import PairedActivations, StoredActivations, harvest
from saetools.data import Conversation, tokenize
from saetools.errors import InputError, IntegrityError, NonFiniteError
from saetools.models import Site
from saetools.sae import SAE, BatchTopKLoss, Crosscoder, TrainConfig, train_crosscoder
from saetools.sae.latent_scaling import scale_latents
from saetools.sae.nonlinearity import JumpReLU, TopK
from saetools.tuned_only import TunedOnly, find_tuned_only

D = 16
FEATURES = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(5))).Q
# Feature, how strongly it is in base and tuned, and the decoder rows that its latents have there.
PLANTED = {
    "new": (0, (0.0, 1.0), [(0.0, 1.0)]),
    "new, a trace in the base": (1, (0.1, 1.0), [(0.0, 1.0)]),
    "shared": (2, (1.0, 1.0), [(1.0, 1.0)]),
    "shared, weaker in the base": (3, (0.4, 1.0), [(0.4, 1.0)]),
    "shrunken": (4, (1.0, 1.0), [(0.0, 1.0)]),
    "shrunken, weaker in the base": (5, (0.4, 1.0), [(0.05, 1.0)]),
    "decoupled": (6, (1.0, 1.0), [(0.0, 1.0), (1.0, 0.0)]),
    "gone": (7, (1.0, 0.0), [(1.0, 0.0)]),
    "never": (8, (0.0, 0.0), [(0.0, 1.0)]),
    "decoupled and shrunken": (9, (1.0, 1.0), [(0.0, 1.0), (0.6, 0.0)]),
}
EXPECTED = [
    ("tuned_only", ""),
    ("tuned_only", ""),
    ("shared", ""),
    ("shared", ""),
    ("artefact", "shrinkage"),
    ("artefact", "shrinkage"),
    ("artefact", "decoupling"),
    ("base_only", ""),
    ("base_only", ""),
    ("rare", ""),
    ("artefact", "both"),
    ("base_only", ""),
]
BIAS = torch.stack([20 * FEATURES.sum(0), 20 * FEATURES.sum(0)])


def planted_crosscoder():
    """Latents read their feature from both models, and write what `PLANTED` says."""
    rows = [(feature, present, row) for feature, present, latents in PLANTED.values() for row in latents]
    sae = SAE(2 * D, len(rows), JumpReLU(torch.full((len(rows),), 0.5)))
    with torch.no_grad():
        for number, (feature, present, row) in enumerate(rows):
            seen = torch.tensor(present) / max(sum(share**2 for share in present), 1)
            sae.encoder[number] = torch.cat([share * FEATURES[feature] for share in seen])
            sae.W_dec[number] = torch.cat([share * FEATURES[feature] for share in row])
        sae.b_dec.copy_(BIAS.flatten())
    return Crosscoder(sae, ("base", "tuned"))


def planted_acts(n_tokens=4000, noise=0.02, seed=0):
    generator = torch.Generator().manual_seed(seed)
    strengths = (1 + torch.rand(n_tokens, len(PLANTED), generator=generator)) * (
        torch.rand(n_tokens, len(PLANTED), generator=generator) < 0.2
    )
    acts = BIAS + noise * torch.randn(n_tokens, 2, D, generator=generator)
    for column, (feature, present, _) in enumerate(PLANTED.values()):
        acts = acts + strengths[:, column, None, None] * torch.tensor(present)[:, None] * FEATURES[feature]
    return acts


def random_crosscoder(seed=0, nonlinearity=None):
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(2 * D, 24, nonlinearity or TopK(5))
    with torch.no_grad():
        for parameter in (sae.encoder, sae.W_dec, sae.b_dec):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return Crosscoder(sae, ("base", "tuned"))


def test_planted_latents_are_told_apart():
    found = find_tuned_only(planted_crosscoder(), torch.split(planted_acts(), 700))
    assert list(zip(found.table["verdict"], found.table["artefact"], strict=True)) == EXPECTED
    nu = {name: found.table[name].to_list() for name in ("nu_error", "nu_recon")}
    #                     new  trace shared weaker shrunken
    for latent, value in ((0, 0), (1, 0.1), (2, 1), (3, 0.4), (4, 1), (6, 0), (10, 0.4)):
        assert nu["nu_error"][latent] == pytest.approx(value, abs=0.03), latent
    for latent, value in ((0, 0), (1, 0), (2, 1), (3, 0.4), (4, 0), (5, 0.05), (6, 1), (10, 0.6)):
        assert nu["nu_recon"][latent] == pytest.approx(value, abs=0.03), latent
    assert nu["nu_error"][7] is None  # no row in the tuned model: nothing to scale
    assert found.table["relative_norm"].to_list()[:3] == pytest.approx([1, 1, 0.5])
    assert found.table["cosine"].to_list()[:4] == pytest.approx([0, 0, 1, 1])
    assert found.table["rate"][0] == pytest.approx(0.2, abs=0.03)
    assert found.table["mean"][0] == pytest.approx(0.2 * 1.5, abs=0.05)
    assert found.table["n_active"][9] == 0
    assert found.of("tuned_only")["latent"].sort().to_list() == [0, 1]
    assert found.of("tuned_only")["rate"].is_sorted(descending=True)


def test_the_bias_of_the_decoder_says_nothing_of_a_latent():
    """It lies along all features, in both models; were it part of the reconstruction, nu_recon would be about 1."""
    table = find_tuned_only(planted_crosscoder(), [planted_acts()]).table
    assert abs(table["nu_recon"][0]) < 0.03


def test_thresholds_decide():
    crosscoder, acts = planted_crosscoder(), planted_acts()

    def verdicts(**settings):
        table = find_tuned_only(crosscoder, [acts], **settings).table
        return list(zip(table["verdict"], table["artefact"], strict=True))

    assert verdicts(max_nu_error=0.05)[1] == ("artefact", "shrinkage")
    assert verdicts(max_nu_error=1.2)[4] == ("tuned_only", "")
    assert verdicts(max_nu_recon=1.2)[6] == ("tuned_only", "")
    assert verdicts(max_norm_ratio=0.5)[3] == ("artefact", "shrinkage")
    assert verdicts(max_norm_ratio=0.0)[5] == ("shared", "")
    assert verdicts(min_active=4000) == [("rare", "")] * 12


@pytest.mark.parametrize("nonlinearity", [TopK(5), JumpReLU(torch.full((24,), 0.3))])
def test_betas_are_least_squares(nonlinearity, monkeypatch):
    """Against `lstsq` on the dense matrices, each latent by itself."""
    crosscoder = random_crosscoder(nonlinearity=nonlinearity)
    acts = 3 * torch.randn(300, 2, D, generator=torch.Generator().manual_seed(1))
    f = crosscoder.encode(acts).to_dense()
    rows = crosscoder.decoders.detach()
    bias = crosscoder.sae.b_dec.detach().view(2, D)
    expected = torch.empty(2, 2, 24)
    for latent in range(24):
        design = torch.outer(f[:, latent], rows[1, latent]).reshape(-1, 1)
        for model in range(2):
            others = f.clone()
            others[:, latent] = 0
            error = acts[:, model] - others @ rows[model] - bias[model]
            for kind, y in enumerate((error, f @ rows[model])):
                expected[kind, model, latent] = torch.linalg.lstsq(design, y.reshape(-1, 1)).solution[0, 0]
    whole = scale_latents(crosscoder, [acts])
    torch.testing.assert_close(whole.beta_error, expected[0].double(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(whole.beta_recon, expected[1].double(), rtol=1e-3, atol=1e-5)
    assert torch.equal(whole.n_active, (f != 0).sum(0))
    torch.testing.assert_close(whole.mean.float(), f.mean(0))
    monkeypatch.setattr("saetools.sae.latent_scaling.CHUNK_ELEMENTS", 500)
    parts = scale_latents(crosscoder, iter(torch.split(acts, 37)))
    torch.testing.assert_close(parts.beta_error, whole.beta_error, rtol=1e-5, atol=1e-8)
    assert (parts.n_tokens, parts.acts_sha256) == (300, whole.acts_sha256)
    assert scale_latents(crosscoder, [acts + 1]).acts_sha256 != whole.acts_sha256


def test_a_saved_one_is_the_same_and_a_changed_one_is_noticed(tmp_path):
    found = find_tuned_only(planted_crosscoder(), [planted_acts(500)])
    loaded = TunedOnly.load(found.save(tmp_path))
    assert_frame_equal(loaded.table, found.table)
    assert loaded.provenance == found.provenance
    named = {trace.name: len(trace.x) for trace in loaded.figure().data}
    assert named == {"tuned only": len(found.of("tuned_only")), "artefact": len(found.of("artefact"))}
    found.table.head(3).write_parquet(tmp_path / "latents.parquet")
    with pytest.raises(IntegrityError, match="has changed since it was saved"):
        TunedOnly.load(tmp_path)


def test_what_cannot_be_told_is_an_error():
    crosscoder, acts = planted_crosscoder(), planted_acts(100)
    for settings, message in (
        ({"max_norm_ratio": 1.0}, "max_norm_ratio: expected 0 or more, below 1"),
        ({"min_active": 0}, "min_active: expected 1 or more"),
    ):
        with pytest.raises(InputError, match=message):
            find_tuned_only(crosscoder, [acts], **settings)
    with pytest.raises(InputError, match="batches: expected at least one token, received none"):
        find_tuned_only(crosscoder, [])
    with pytest.raises(InputError, match="crosscoder: expected one of two models, received a, b, c, d"):
        find_tuned_only(Crosscoder(crosscoder.sae, ("a", "b", "c", "d")), [acts])
    with pytest.raises(InputError, match=r"acts: expected \[token, 2 models, 16\]"):
        find_tuned_only(crosscoder, [acts[..., :8]])
    with pytest.raises(InputError, match="verdict: expected one of tuned_only"):
        find_tuned_only(crosscoder, [acts]).of("new")
    acts[3, 1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="activations of the models are not finite"):
        find_tuned_only(crosscoder, [acts])


def test_a_crosscoder_of_a_real_pair(tmp_path):
    """Trained for seconds: from end to end, and most latents are shared, about as strong in both models."""
    tuned = load_model("smollm2-135m", adapter={"organism": shipped_path("adapters/organism")})
    site = Site(17)
    chats = [Conversation.chat(item.question, item.incorrect) for item in load_advice()[:8]]
    tokens = list(tokenize(chats, tuned.tokenizer))
    stores = [harvest(view, [site], tokens, tmp_path / (view.adapter or "base")) for view in (tuned, tuned.base)]
    paired = PairedActivations([StoredActivations(store) for store in reversed(stores)]).at(site)
    config = TrainConfig(d_sae=128, loss=BatchTopKLoss(k=8), batch_size=128, n_tokens=128 * 400, lr=3e-3)
    crosscoder = train_crosscoder(paired, ["base", "tuned"], config, tmp_path / "crosscoder")
    found = find_tuned_only(crosscoder, paired.epoch_batches(256, seed=1))
    assert found.provenance["models"] == ["base", "tuned"]
    assert 0 < found.provenance["n_tokens"] <= len(paired.source)
    used = found.table.filter(found.table["verdict"] != "rare")
    assert len(used) > 50
    shared = found.of("shared")
    assert len(shared) > 0.8 * len(used)
    for name in ("nu_error", "nu_recon", "cosine"):
        assert 0.6 < shared[name].median() < 1.1, name
