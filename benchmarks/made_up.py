"""A corpus of any size and the latents that are active on it, made up: what they are does not change the work."""

from __future__ import annotations

import torch

from saetools.data import Role, TokenizedConversation
from saetools.sae.sparse import TokenMajorPairs

DATASETS = ("chat", "code", "news", "web")
DOCUMENT = 512  # tokens
N_DENSE = 8  # latents that fire on half of the tokens
SLOTS = 28  # latents a token besides those: 32 on average
EXPONENT = 1.5
"""Of the rates of the others, which fall from 40 % to below one token in ten thousand."""
VOCABULARY = 49_152


def documents(n_tokens: int) -> list[TokenizedConversation]:
    """Documents of random tokens with Zipf's rates; half of each is a prompt."""
    generator = torch.Generator().manual_seed(0)
    weights = 1 / (torch.arange(VOCABULARY) + 2.7)
    roles = torch.full((DOCUMENT,), int(Role.RESPONSE), dtype=torch.uint8)
    roles[: DOCUMENT // 2] = int(Role.PROMPT)
    return [
        TokenizedConversation(
            torch.multinomial(weights, DOCUMENT, replacement=True, generator=generator),
            roles,
            id=f"document-{number}",
            source=DATASETS[number * len(DATASETS) // -(-n_tokens // DOCUMENT)],
        )
        for number in range(-(-n_tokens // DOCUMENT))
    ]


def pairs(n_tokens: int, d_sae: int, *, seed: int) -> TokenMajorPairs:
    """Random latents of some documents: the dense ones, and one of each residue class with Zipf's rates."""
    generator = torch.Generator().manual_seed(seed)
    n_ranks = (d_sae - N_DENSE) // SLOTS
    limits = (1 / torch.arange(1, n_ranks + 1) ** EXPONENT).cumsum(0)
    drawn = torch.rand(n_tokens, SLOTS, generator=generator) * limits[-1]
    ranks = torch.searchsorted(limits, drawn).clamp_(max=n_ranks - 1)
    sparse = N_DENSE + ranks * SLOTS + torch.arange(SLOTS)
    latents = torch.cat([torch.arange(N_DENSE).expand(n_tokens, -1), sparse], 1)
    active = torch.ones(latents.shape, dtype=torch.bool)
    active[:, :N_DENSE] = torch.rand(n_tokens, N_DENSE, generator=generator) < 0.5
    active[::DOCUMENT] = False
    tokens, slots = active.nonzero(as_tuple=True)
    values = torch.rand(len(tokens), generator=generator).clamp_min_(1e-6).log_().neg_().add_(0.01)
    return TokenMajorPairs(tokens, latents[tokens, slots], values, n_tokens)
