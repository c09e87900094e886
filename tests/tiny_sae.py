"""Small SAEs and adapters for tests of everything that reads or edits latents."""

import torch
from peft import LoraConfig, get_peft_model

from saetools.models import load_model
from saetools.sae.model import SAE, SAEMetadata
from saetools.sae.nonlinearity import AbsTopK, Gated, JumpReLU, MatchingPursuit, ReLU, TopK

KINDS = ("topk", "jumprelu", "relu")
DEAD = 7
"""A latent of every `make_sae` that never fires."""


def make_sae(
    kind="topk",
    *,
    d_in=32,
    d_sae=48,
    site="blocks.1.hook_resid_post",
    median_norm=2.5,
    dtype=torch.float32,
    input_norm="none",
):
    """A random SAE with decoder rows of several lengths and a 99th percentile for every latent."""
    generator = torch.Generator().manual_seed(0)
    thresholds = torch.rand(d_sae, generator=generator) if kind == "jumprelu" else torch.zeros(d_sae)
    kinds = {
        "topk": lambda: TopK(4),
        "abs_topk": lambda: AbsTopK(12),
        "pursuit": lambda: MatchingPursuit(0.0, max_steps=6),
        "gated": lambda: Gated(torch.linspace(-0.2, 0.2, d_sae), torch.linspace(0.1, -0.1, d_sae)),
        "plain": ReLU,
    }
    nonlinearity = kinds[kind]() if kind in kinds else JumpReLU(thresholds)
    metadata = SAEMetadata(site=site, median_norm=median_norm)
    sae = SAE(d_in, d_sae, nonlinearity, input_norm=input_norm, metadata=metadata, dtype=dtype)
    with torch.no_grad():
        for parameter, std in ((sae.encoder, 1.0), (sae.W_dec, 0.3), (sae.b_enc, 0.1), (sae.b_dec, 0.1)):
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        sae.b_enc[DEAD] = 0.0 if kind == "abs_topk" else -1000.0
        if kind == "abs_topk":
            sae.encoder[DEAD] = 0.0
        if kind == "pursuit":  # longer rows take away more than there is
            sae.encoder.copy_(torch.nn.functional.normalize(sae.encoder, dim=1))
    sae.p99 = torch.rand(d_sae, generator=generator) + 0.5
    return sae


def basis_sae(*, signs=(1,), d_in=32, site="blocks.1.hook_resid_post"):
    """Orthonormal latents; with both signs (1, -1) it reconstructs everything."""
    q = torch.linalg.qr(torch.randn(d_in, d_in, generator=torch.Generator().manual_seed(3))).Q
    rows = torch.cat([sign * q for sign in signs])
    sae = SAE(d_in, len(rows), JumpReLU(torch.zeros(len(rows))), metadata=SAEMetadata(site=site))
    with torch.no_grad():
        sae.encoder.copy_(rows)
        sae.W_dec.copy_(rows)
        sae.b_dec.fill_(0.05)
    return sae


def with_random_adapter(lm, name="tuned", **settings):
    """The view of a model through a random LoRA."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(r=2, init_lora_weights=False, **{"target_modules": ["q_proj", "down_proj"], **settings})
        return load_model(get_peft_model(lm.model, config, adapter_name=name), tokenizer=lm.tokenizer)
