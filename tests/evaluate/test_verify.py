"""A good SAE fits; broken in each way, it is told what is wrong."""

import copy
import math

import pytest
import torch
from torch import nn

from saetools.data import Conversation, load_voices, shipped_path
from saetools.errors import InputError
from saetools.evaluate import verify_sae
from saetools.models import Site, load_model
from saetools.sae import load_sae

TEXTS = [Conversation(text=pair.neutral) for pair in load_voices()[:4]]
SITE = Site(17)


@pytest.fixture(scope="module")
def sae():
    return load_sae(shipped_path("sae/smollm2-135m"))


def broken(sae, **weights):
    other = copy.deepcopy(sae)
    for name, weight in weights.items():
        setattr(other, name, weight if isinstance(weight, bool) else nn.Parameter(weight, requires_grad=False))
    return other


def as_read_transposed(weight):
    return weight.T.contiguous().reshape(weight.shape)


NORMS = torch.logspace(-1, 1, 8192)[torch.randperm(8192, generator=torch.Generator().manual_seed(0))]
FAULTS = {
    "layer": (lambda sae: sae, Site(15), "trained at another site", "blocks.17.hook_resid_post"),
    "stream": (lambda sae: sae, Site(17, "mlp_out"), "trained at another site", "blocks.17.hook_resid_post"),
    "b_dec": (lambda sae: broken(sae, apply_b_dec_to_input=False), SITE, "b_dec", "apply_b_dec_to_input=True"),
    "scale": (
        lambda sae: broken(sae, b_enc=sae.b_enc * 0.1, b_dec=sae.b_dec * 0.1),
        SITE,
        "a scale of activations that is not folded",
        "multiply activations by 0.1",
    ),
    "norms": (
        lambda sae: broken(
            sae, encoder=sae.encoder / NORMS[:, None], b_enc=sae.b_enc / NORMS, W_dec=sae.W_dec * NORMS[:, None]
        ),
        SITE,
        "decoder norms left out",
        "multiply encoder and b_enc by the decoder norms",
    ),
    "decoder": (
        lambda sae: broken(sae, W_dec=sae.W_dec * NORMS[:, None]),
        SITE,
        "a decoder that was not normalised",
        "divide decoder rows",
    ),
    "W_dec": (lambda sae: broken(sae, W_dec=as_read_transposed(sae.W_dec)), SITE, "transposed weights (W_dec)", ""),
    "encoder": (
        lambda sae: broken(sae, encoder=as_read_transposed(sae.encoder)),
        SITE,
        "transposed weights (encoder)",
        "",
    ),
}


def test_a_good_sae_fits(smollm, sae):
    verdict = verify_sae(sae, smollm, TEXTS)
    assert verdict.fits
    assert str(verdict).endswith(": fits")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_sae_is_told_what_is_wrong(smollm, sae, fault):
    make, site, words, remedy = FAULTS[fault]
    verdict = verify_sae(make(sae), smollm, TEXTS, site=site)
    assert not verdict.fits
    first = verdict.suspects[0]
    assert words in first.fault, str(verdict)
    assert remedy in first.remedy
    assert first.fvu < 0.3


def test_an_sae_of_another_view(sae):
    """Trained on the base, read on a model whose adapter turns its residuals."""
    lm = load_model("smollm2-135m", adapter=shipped_path("adapters/organism"))
    for parameter in (p for name, p in lm.model.named_parameters() if "lora_B" in name and "layers.5." in name):
        parameter.data.mul_(60)
    verdict = verify_sae(sae, lm, TEXTS)
    assert any(one.remedy == "read the model without an adapter" for one in verdict.suspects[:1]), str(verdict)


def test_what_cannot_be_verified_is_an_error(smollm, tiny, sae):
    with pytest.raises(InputError, match="sae: expected an autoencoder of width 32"):
        verify_sae(sae, tiny, TEXTS)
    verdict = verify_sae(broken(sae, W_dec=torch.zeros_like(sae.W_dec)), smollm, TEXTS)
    assert math.isfinite(verdict.fidelity.all.fvu.mean)
