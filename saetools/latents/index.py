"""Index which latents fire where: models read a corpus once, and a latent store keeps what they did.

For looking at latents, and for explaining them: passages, datasets, documents, neighbours. For statistics of all
latents alone, `measure_latents` takes no disk space; for two models compared with intervals, take `diff_latents`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from saetools.activations.stream import stream_activations
from saetools.data.conversation import Conversation
from saetools.data.template import render
from saetools.data.tokenizing import TokenizedConversation, TokenizeReport, tokenize
from saetools.errors import InputError
from saetools.latents.pairs import join_pairs, sparse_pairs
from saetools.latents.store import LatentStore
from saetools.latents.vocabulary import token_bytes
from saetools.latents.write import write_latents
from saetools.models.language_model import LanguageModel
from saetools.models.load import check_pair
from saetools.models.site import Site
from saetools.sae.identity import sae_sha256, sae_site
from saetools.sae.model import SAE
from saetools.sae.sparse import TokenMajorPairs

_CHUNK = 4096  # tokens encoded at a time


def index_latents(
    models: Mapping[str, LanguageModel],
    sae: SAE,
    corpus: Mapping[str, Sequence[Conversation]],
    out: str | Path,
    *,
    site: Site | None = None,
    max_tokens: int = 512,
    batch_tokens: int = 4096,
    shard_tokens: int = 65_536,
    skip_first: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentStore:
    """Write the active latents of models on a corpus to a folder; a run that was killed continues, to the same bytes.

    It takes about 10 bytes of disk space for each active latent of a token and model: 640 a token with two models and
    32 active latents, and half as much again while it runs.

    Args:
        models: models that are compared, by name; those after the first are fine-tunes of it. All read the tokens that
            the first one's tokenizer gives.
        sae: the SAE through which they are read.
        corpus: conversations and texts of each dataset.
        out: folder of the store; made if missing.
        site: where the SAE reads; by default what its metadata says.
        max_tokens: longer texts become several documents, longer chats are cut (and counted in the manifest).
        batch_tokens: padded tokens of a forward pass.
        shard_tokens: about how many tokens are read between two states that a killed run can continue from.
        skip_first: leave out first positions, which are attention sinks with huge norms.
        on_progress: called with stages done and in all: the corpus, every shard, three of each model.

    Raises:
        InputError: for models that cannot be compared, an SAE of another width, an empty corpus, or a folder that holds
            something else.
        IntegrityError: if a file of the run that this one continues is missing or has another size.
        NonFiniteError: if an activation is not finite.
        ResourceError: if memory or disk space runs out; what was written stays.

    Example:
        >>> import tempfile
        >>> sae = load_sae(shipped_path("sae/smollm2-135m"))
        >>> voices = [Conversation(text=pair.voiced, id=pair.id) for pair in load_voices()[:3]]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = index_latents({"base": lm}, sae, {"voices": voices}, folder)
        ...     store.d_sae, store.open_latent(int(store.latents_at(torch.tensor([5])).latents[0])).n_documents > 0
        (8192, True)
    """
    if not models or not any(corpus.values()):
        argument = "corpus" if models else "models"
        raise InputError(argument, expected="at least one", received="none", remedy="pass what to index")
    first = next(iter(models.values()))
    site = site or sae_site(sae)
    if sae.d_in != first.d_model:
        raise InputError(
            "sae", expected=f"an SAE of width {first.d_model}", received=sae.d_in, remedy="load an SAE of this model"
        )
    for other in list(models.values())[1:]:
        alike = first.tokenizer is other.tokenizer
        check_pair(first, other, () if alike else [_text(first, one) for each in corpus.values() for one in each])
    report = TokenizeReport()
    documents = [
        replace(piece, source=dataset)
        for dataset, conversations in corpus.items()
        for piece in tokenize(conversations, first.tokenizer, max_tokens=max_tokens, split_texts=True, report=report)
    ]

    def read(some: range) -> dict[str, TokenMajorPairs]:
        chosen = [documents[one] for one in some]
        return {
            name: _read(lm, sae, site, chosen, batch_tokens=batch_tokens, skip_first=skip_first)
            for name, lm in models.items()
        }

    provenance = {
        "models": {name: lm.describe() for name, lm in models.items()},
        "sae": {"model_name": sae.metadata.model_name, "sha256": sae_sha256(sae)},
        "site": str(site),
        "max_tokens": max_tokens,
        "batch_tokens": batch_tokens,
        "n_truncated": report.n_truncated,
        "n_tokens_cut": report.n_tokens_cut,
    }
    write_latents(
        out,
        documents,
        read,
        models=list(models),
        directions=sae.directions(),
        vocabulary=token_bytes(first.tokenizer),
        provenance=provenance,
        skip_first=skip_first,
        shard_tokens=shard_tokens,
        on_progress=on_progress,
    )
    return LatentStore(out)


def _read(
    lm: LanguageModel,
    sae: SAE,
    site: Site,
    documents: Sequence[TokenizedConversation],
    *,
    batch_tokens: int,
    skip_first: bool,
) -> TokenMajorPairs:
    """The active latents of one model on all tokens of some documents."""
    lengths = torch.tensor([len(one) for one in documents])
    starts, n_rows = lengths.cumsum(0) - lengths, int(lengths.sum())
    pieces = []
    for block in stream_activations(lm, [site], documents, batch_tokens=batch_tokens, skip_first=skip_first):
        rows: Int[Tensor, " token"] = starts[block.documents] + block.positions
        for acts, some in zip(torch.split(block.acts[site], _CHUNK), torch.split(rows, _CHUNK), strict=True):
            pieces.append(sparse_pairs(sae.encode(acts.to(sae.W_dec.device)), some, n_rows))
    return join_pairs(pieces, n_rows)


def _text(lm: LanguageModel, conversation: Conversation) -> str:
    return render(conversation, lm.tokenizer) if conversation.text is None else conversation.text
