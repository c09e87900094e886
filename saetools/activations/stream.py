"""Token activations of a model at some sites, as an iterator over blocks of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from saetools.activations.shuffle import Activations
from saetools.data.tokenizing import Batch, TokenizedConversation, make_batches, require_tokenized, tokens_sha256
from saetools.errors import InputError, NonFiniteError
from saetools.models.forward import read
from saetools.models.language_model import LanguageModel
from saetools.models.site import Site
from saetools.provenance import sha256_of_texts


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


class StreamedActivations(Activations[tuple[int, ...]]):
    """Activations read from a model while something trains on them, with no store; a pool is some conversations.

    Nothing is written. Every epoch runs the model again, which a store would save; a resumed run reads the pool that it
    was in once more.

    Args:
        lm: the model.
        sites: where to read.
        conversations: tokenised conversations or texts.
        buffer_tokens: tokens in memory at the same time, in `dtype`, which are shuffled together.
        batch_tokens: padded tokens of a forward pass.
        dtype: of the tokens in memory.
        skip_first: leave out first positions, which are attention sinks with huge norms.
        overlap: read the next half of the buffer in another thread while one half is trained on, which pays where the
            model and the SAE have devices of their own (on the same two CPU cores it took a fifth longer); nothing else
            may run the model meanwhile.

    Example:
        >>> tokens = list(tokenize([Conversation(text=pair.neutral) for pair in load_voices()[:4]], lm.tokenizer))
        >>> source = StreamedActivations(lm, [Site(1)], tokens, buffer_tokens=64)
        >>> next(source.at(Site(1)).epoch_batches(32, seed=0)).shape
        torch.Size([32, 576])
    """

    def __init__(
        self,
        lm: LanguageModel,
        sites: Sequence[Site],
        conversations: Sequence[TokenizedConversation],
        *,
        buffer_tokens: int = 131_072,
        batch_tokens: int = 4096,
        dtype: torch.dtype = torch.bfloat16,
        skip_first: bool = True,
        overlap: bool = False,
    ) -> None:
        require_tokenized(conversations)
        if not conversations:
            raise InputError("conversations", expected="at least one", received="none", remedy="pass what to read")
        if buffer_tokens < 1:
            raise InputError("buffer_tokens", expected="1 or more", received=buffer_tokens, remedy="raise it")
        self.lm = lm
        self.sites = tuple(sites)
        self.conversations = conversations
        self.pool_tokens = buffer_tokens // 2 if overlap else buffer_tokens
        self.batch_tokens = batch_tokens
        self.dtype = dtype
        self.skip_first = skip_first
        self.overlap = overlap
        self._lengths = [max(0, len(one) - skip_first) for one in conversations]
        self._sampled: tuple[tuple[int, ...], dict[Site, Tensor]] | None = None

    def __len__(self) -> int:
        return sum(self._lengths)

    @property
    def reads(self) -> str:
        """Of the token ids of all conversations."""
        return sha256_of_texts([tokens_sha256(self.conversations, "token_ids"), str(self.skip_first)])

    def pools(self, generator: torch.Generator) -> list[tuple[tuple[int, ...], int]]:
        """Groups of conversations in random order."""
        groups: list[tuple[tuple[int, ...], int]] = []
        group: list[int] = []
        n_tokens = 0
        for index in torch.randperm(len(self._lengths), generator=generator).tolist():
            if group and n_tokens + self._lengths[index] > self.pool_tokens:
                groups.append((tuple(group), n_tokens))
                group, n_tokens = [], 0
            group.append(index)
            n_tokens += self._lengths[index]
        return [*groups, (tuple(group), n_tokens)]

    def load(self, key: tuple[int, ...]) -> dict[Site, Float[Tensor, "token d_model"]]:
        """The activations of some conversations."""
        if self._sampled is not None and self._sampled[0] == key:
            pool, self._sampled = self._sampled[1], None
            return pool
        chosen = [self.conversations[index] for index in key]
        n_tokens = sum(self._lengths[index] for index in key)
        pool = {site: torch.empty(n_tokens, self.lm.d_model, dtype=self.dtype) for site in self.sites}
        start = 0
        for block in stream_activations(
            self.lm, self.sites, chosen, batch_tokens=self.batch_tokens, skip_first=self.skip_first
        ):
            for site, acts in block.acts.items():
                pool[site][start : start + len(block)] = acts
            start += len(block)
        return pool

    def loaded(self, keys: Iterator[tuple[int, ...]]) -> Iterator[dict[Site, Float[Tensor, "token d_model"]]]:
        """The activations of some groups, the next one on its way if reading overlaps with training."""
        if not self.overlap:
            yield from super().loaded(keys)
            return
        n_threads = torch.get_num_threads()  # another number would give other bytes
        with ThreadPoolExecutor(max_workers=1, initializer=torch.set_num_threads, initargs=(n_threads,)) as thread:
            coming: Future[dict[Site, Tensor]] | None = None
            for key in keys:
                before, coming = coming, thread.submit(self.load, key)
                if before is not None:
                    yield before.result()
            if coming is not None:
                yield coming.result()

    def sample(self, n_tokens: int, *, seed: int) -> dict[Site, Float[Tensor, "token d_model"]]:
        """Random tokens of the first pool of the first epoch, which is kept: training reads it next."""
        key, order = self.first_pool(seed)
        pool = self.load(key)
        self._sampled = key, pool
        return {site: acts[order[:n_tokens]] for site, acts in pool.items()}
