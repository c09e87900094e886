"""What one model's latents did in each of some conversations, by token role, kept sparse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.activations.stream import ActivationBlock, stream_activations
from saetools.data.roles import Positions, select_positions
from saetools.data.tokenizing import TokenizedConversation
from saetools.latents.tally import ActivationTally
from saetools.models.language_model import LanguageModel
from saetools.models.site import Site
from saetools.sae.model import SAE
from saetools.sae.sparse import SparseLatents

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class RoleReading:
    """Latents at the positions of one role; a conversation's means are over its tokens there.

    Args:
        conversation: of each (conversation, latent) pair with any activity, ascending; its index in what was read.
        latent: of each pair, ascending within a conversation.
        mean: mean activation of each pair.
        rate: share of the conversation's tokens on which the latent is active.
        n_tokens: tokens of every conversation at these positions; 0 for one that has none.
        max: each latent's largest size of an activation.
        quantiles: those of `QUANTILES` of each latent's sizes where it is active; 0 where it never is.
    """

    conversation: Int[Tensor, " pair"]
    latent: Int[Tensor, " pair"]
    mean: Float[Tensor, " pair"]
    rate: Float[Tensor, " pair"]
    n_tokens: Int[Tensor, " conversation"]
    max: Float[Tensor, " d_sae"]
    quantiles: Float[Tensor, "quantile d_sae"]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.max)

    def dense(self, latents: Int[Tensor, " latent"]) -> Float[Tensor, "conversation latent"]:
        """Mean activations of some latents in every conversation; 0 also where a conversation has no such tokens."""
        column = torch.full((self.d_sae,), -1)
        column[latents] = torch.arange(len(latents))
        asked = column[self.latent] >= 0
        out = torch.zeros(len(self.n_tokens), len(latents))
        return out.index_put_((self.conversation[asked], column[self.latent[asked]]), self.mean[asked])


class LatentReader:
    """Gathers readings from blocks of tokens; memory grows with the active latents of conversations, not with tokens.

    Args:
        n_conversations: conversations in all.
        d_sae: latents.
        positions: the roles to read.
    """

    def __init__(self, n_conversations: int, d_sae: int, positions: Sequence[Positions]) -> None:
        self._d_sae = d_sae
        self._tallies = {role: ActivationTally(d_sae) for role in positions}
        self._n_tokens = {role: torch.zeros(n_conversations, dtype=torch.long) for role in positions}
        self._pairs: dict[Positions, list[tuple[Tensor, Tensor]]] = {role: [] for role in positions}

    def add(self, block: ActivationBlock, latents: SparseLatents) -> None:
        """Count the tokens of a block, in which each conversation is whole."""
        indices, values = latents.indices.cpu(), latents.values.float().cpu()
        for role, tally in self._tallies.items():
            chosen = select_positions(block.roles, role)
            here = SparseLatents(indices[chosen], values[chosen], self._d_sae)
            tally.add(here)
            rows = block.documents[chosen]
            self._n_tokens[role] += torch.bincount(rows, minlength=len(self._n_tokens[role]))
            active = here.values != 0
            cells = (rows[:, None] * self._d_sae + here.indices)[active]
            keys, place = torch.unique(cells, return_inverse=True)
            sums = torch.zeros(2, len(keys))
            for row, each in zip(sums, (here.values[active], torch.ones(len(place))), strict=True):
                row.index_add_(0, place, each)
            self._pairs[role].append((keys, sums))

    def readings(self) -> dict[Positions, RoleReading]:
        """What was read, by role."""
        found: dict[Positions, RoleReading] = {}
        for role, pairs in self._pairs.items():
            keys = torch.cat([torch.zeros(0, dtype=torch.long), *(keys for keys, _ in pairs)])
            order = torch.argsort(keys)
            keys = keys[order]
            conversation = keys // self._d_sae
            counts = self._n_tokens[role]
            sums = torch.cat([torch.zeros(2, 0), *(sums for _, sums in pairs)], 1)[:, order]
            means, rates = sums / counts[conversation]
            tally = self._tallies[role]
            quantiles = torch.stack([tally.quantile(q) for q in QUANTILES])
            found[role] = RoleReading(
                conversation, keys % self._d_sae, means, rates, counts, tally.max.clone(), quantiles
            )
        return found


def read_latents(
    lm: LanguageModel,
    sae: SAE,
    site: Site,
    conversations: Sequence[TokenizedConversation],
    positions: Sequence[Positions],
    *,
    batch_tokens: int = 4096,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[Positions, RoleReading]:
    """Read conversations with one model, at several roles in one pass; first positions do not count.

    Args:
        lm: the model.
        sae: the SAE.
        site: where it reads.
        conversations: what is read.
        positions: token roles.
        batch_tokens: padded tokens of a forward pass.
        on_progress: called with conversations done and in all.
    """
    reader, done = LatentReader(len(conversations), sae.d_sae, positions), 0
    for block in stream_activations(lm, [site], conversations, batch_tokens=batch_tokens):
        reader.add(block, sae.encode(block.acts[site].to(sae.W_dec.device)))
        done += len(torch.unique(block.documents))
        if on_progress is not None:
            on_progress(done, len(conversations))
    return reader.readings()
