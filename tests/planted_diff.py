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


def adequacy(in_active_rows=0.9):
    """Of an SAE that sees a change, or of one that does not."""
    names = ("fvu_base", "fvu_tuned", "l0_base", "l0_tuned", "change", "reproduced", "in_active_rows", "in_random_rows")
    values = (0.1, 0.1, 4.0, 4.0, 1.0, 0.5, in_active_rows, 0.3)
    estimates = {
        name: Estimate(value, value - 0.01, value + 0.01, 0.005, 2) for name, value in zip(names, values, strict=True)
    }
    return Adequacy(**estimates, rest_shares=(), rest_directions=torch.zeros(0, 4), n_tokens=2)


BLIND = "prompt: the SAE is blind to the change: 10% of it lies in the span of the active decoder rows, 30% in that of "
"""How the warning of a `planted_diff` begins whose SAE is blind to the change."""


def planted_diff(changes, *, role="prompt", sae="sae", data="data", noise=0.3, seed=0):
    """The diff of conversations whose latents change by these means [conversation, latent], with noise."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(changes.shape, generator=generator)
    tuned = base + changes + noise * torch.randn(changes.shape, generator=generator)
    config = DiffConfig(n_resamples=50, seed=seed)
    table, pairs = compare_readings({role: reading(base)}, {role: reading(tuned)}, config=config)
    facts = {"sae": sae, "site": "blocks.1.hook_resid_post", "data_sha256": data, "seed": seed}
    facts["config"] = {"min_active": config.min_active}
    return LatentDiff(table, pairs, {role: adequacy()}, facts)
