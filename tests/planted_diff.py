"""Diffs with planted changes, made of readings rather than models."""

import torch

from saetools.adequacy import Adequacy
from saetools.diff import DiffConfig, LatentDiff, compare_readings
from saetools.latents.reading import RoleReading
from saetools.stats import Estimate


def reading(means):
    """What a model's latents did, from their mean activation in every conversation."""
    n, d_sae = means.shape
    conversation, latent = means.nonzero().T
    pairs = means[conversation, latent]
    return RoleReading(
        conversation,
        latent,
        pairs,
        torch.ones(len(pairs)),
        torch.full((n,), 5),
        means.abs().amax(0),
        means.abs().amax(0).expand(3, d_sae),
    )


def adequacy():
    """Figures that say nothing."""
    estimates = [Estimate(0.0, 0.0, 0.0, 0.0, 2)] * 8
    return Adequacy(*estimates, rest_shares=(), rest_directions=torch.zeros(0, 4), n_tokens=2)


def planted_diff(changes, *, role="prompt", sae="sae", data="data", noise=0.3, seed=0):
    """The diff of conversations whose latents change by these means [conversation, latent], with noise."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(changes.shape, generator=generator)
    tuned = base + changes + noise * torch.randn(changes.shape, generator=generator)
    config = DiffConfig(n_resamples=50, seed=seed)
    table, pairs = compare_readings({role: reading(base)}, {role: reading(tuned)}, config=config)
    facts = {"sae": sae, "site": "blocks.1.hook_resid_post", "data_sha256": data, "seed": seed}
    return LatentDiff(table, pairs, {role: adequacy()}, facts)
