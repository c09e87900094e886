"""Token activations of a model at some sites, as an iterator over blocks of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from saetools.data.tokenizing import Batch, TokenizedConversation, make_batches
from saetools.errors import NonFiniteError
from saetools.models.forward import read
from saetools.models.language_model import LanguageModel
from saetools.models.site import Site


@dataclass(frozen=True)
class ActivationBlock:
    """Tokens of some conversations, padding left out.

    Args:
        acts: residual activations per site.
        token_ids: token ids.
        roles: `Role` flags.
        documents: index of each token's conversation in the sequence that was read.
        positions: place of each token in its conversation, from 0.
    """

    acts: dict[Site, Float[Tensor, "token d_model"]]
    token_ids: Int[Tensor, " token"]
    roles: UInt8[Tensor, " token"]
    documents: Int[Tensor, " token"]
    positions: Int[Tensor, " token"]

    def __len__(self) -> int:
        return len(self.token_ids)


def stream_activations(
    lm: LanguageModel,
    sites: Sequence[Site],
    conversations: Sequence[TokenizedConversation],
    *,
    batch_tokens: int = 4096,
    skip_first: bool = True,
) -> Iterator[ActivationBlock]:
    """Run conversations through a model and yield the activations of their tokens, batch by batch.

    Conversations of like length are batched together, so documents do not come in order; each comes whole, in one
    block. The forward pass stops after the last site.

    Args:
        lm: the model.
        sites: where to read.
        conversations: tokenised conversations or texts.
        batch_tokens: padded tokens of a forward pass.
        skip_first: leave out first positions, which are attention sinks with huge norms.

    Raises:
        NonFiniteError: if an activation is NaN or infinite; names the conversation.

    Example:
        >>> tokens = list(tokenize([Conversation.chat("Hello")], lm.tokenizer))
        >>> [block.acts[Site(1)].shape for block in stream_activations(lm, [Site(1)], tokens)]
        [torch.Size([26, 576])]
    """
    for batch in make_batches(conversations, batch_tokens=batch_tokens):
        yield _read_block(lm, sites, conversations, batch, skip_first=skip_first)


# Not around the generator: its caller must get gradients back between the blocks.
@torch.no_grad()
def _read_block(
    lm: LanguageModel,
    sites: Sequence[Site],
    conversations: Sequence[TokenizedConversation],
    batch: Batch,
    *,
    skip_first: bool,
) -> ActivationBlock:
    acts = read(lm, batch.token_ids.to(lm.device), batch.mask.to(lm.device), sites)
    counted = batch.counted(skip_first=skip_first)
    documents = torch.tensor(batch.rows)[:, None].expand_as(batch.token_ids)
    positions = batch.mask.long().cumsum(1) - 1
    kept = {site: values[counted.to(values.device)] for site, values in acts.items()}
    for site, values in kept.items():
        if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
            bad = documents[counted][(~torch.isfinite(values)).any(-1).cpu()][0]
            raise NonFiniteError(
                f"activations at {site} are not finite in conversation {conversations[int(bad)].id!r}; "
                "load the model in float32 or bfloat16, or leave the conversation out"
            )
    return ActivationBlock(kept, batch.token_ids[counted], batch.roles[counted], documents[counted], positions[counted])
