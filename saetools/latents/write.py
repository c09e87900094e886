"""A latent store from active (token, latent) pairs: read shard by shard, then merged.

Every stage writes files to temporary names and is recorded in the manifest when all of them stand, so that a killed run
continues with the stage that it was in. Memory is that of a shard or of a bucket of the merge, whatever the number of
tokens, but for the tokens themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saetools.data.tokenizing import TokenizedConversation, require_tokenized, tokens_sha256
from saetools.errors import InputError, NonFiniteError
from saetools.latents import merge
from saetools.latents.arrays import open_array, write_arrays
from saetools.latents.corpus import CorpusArrays, corpus_arrays, neighbour_arrays
from saetools.latents.manifest import advance, new_identity, start_manifest
from saetools.latents.pairs import LatentPairs, RowPairs
from saetools.provenance import sha256_of_texts, versions
from saetools.room import enough_room
from saetools.sae.sparse import TokenMajorPairs

N_NEIGHBOURS = 16
_Arrays = TypeVar("_Arrays")


@dataclass(frozen=True)
class _Stage:
    """One step of the writing."""

    what: str
    write: Callable[[], merge.Entries]
    obsolete: tuple[str, ...] = ()
    """What names of files begin with that are not needed any more afterwards."""


def write_latents(
    out: str | Path,
    documents: Sequence[TokenizedConversation],
    read: Callable[[range], Mapping[str, TokenMajorPairs]],
    *,
    models: Sequence[str],
    directions: Float[Tensor, "d_sae d_out"],
    vocabulary: Sequence[bytes],
    provenance: Mapping[str, Any],
    skip_first: bool = True,
    shard_tokens: int = 65_536,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a latent store from pairs that something reads; a run that was killed continues, to the same bytes.

    Args:
        out: folder of the store; made if missing.
        documents: the corpus; `source` of each names its dataset.
        read: gives, for a range of documents, the active latents of every model on all their tokens, one document after
            the other; with equal pairs for equal ranges.
        models: names of the models.
        directions: unit decoder rows.
        vocabulary: bytes of each token id, as `token_bytes` gives.
        provenance: what `read` depends on; a run continues only where it is equal.
        skip_first: whether `read` leaves out first positions, so that they are not counted.
        shard_tokens: about how many tokens are read at a time; a shard holds whole documents.
        on_progress: called with stages done and in all: the corpus, every shard, three of each model.

    Raises:
        InputError: if the folder holds something else, or pairs are not those of the documents.
        IntegrityError: if a file of the run that this one continues is missing or has another size.
        NonFiniteError: if an activation is not finite.
        ResourceError: if memory or disk space runs out; what was written stays.
    """
    require_tokenized(documents)
    if not documents or not models:
        argument = "models" if documents else "documents"
        raise InputError(argument, expected="at least one", received="none", remedy="pass what to index")
    out = Path(out)
    datasets = list(dict.fromkeys(one.source for one in documents))
    identity = new_identity(
        {
            "models": list(models),
            "d_sae": len(directions),
            "datasets": datasets,
            "n_documents": len(documents),
            "n_tokens": sum(map(len, documents)),
            "skip_first": skip_first,
            "shard_tokens": shard_tokens,
            "provenance": provenance,
            "data_sha256": tokens_sha256(documents, "token_ids"),
            "roles_sha256": tokens_sha256(documents, "roles"),
            "names_sha256": sha256_of_texts(text for one in documents for text in (one.source, one.id)),
            "vocabulary_sha256": sha256_of_texts(piece.hex() for piece in vocabulary),
            "directions_sha256": sha256_of_texts([directions.detach().cpu().float().numpy().tobytes().hex()]),
            "versions": versions(),
        }
    )
    shards = _plan(documents, shard_tokens)
    manifest = start_manifest(out, identity, 1 + len(shards) + 3 * len(models))
    stages = _stages(out, documents, read, directions, vocabulary, shards, manifest)
    for number, stage in enumerate(stages, start=1):
        if number > manifest["done"]:
            with enough_room(f"{stage.what} in {out}; what was written before stands"):
                written = stage.write()
                advance(out, manifest, written, stage.obsolete)
        if on_progress is not None:
            on_progress(number, len(stages))


def load_arrays(
    kind: type[_Arrays], folder: Path, entries: Mapping[str, Any], prefix: str = "", *, scattered: bool = False
) -> _Arrays:
    """The arrays of a dataclass, by the names of its fields; `scattered` as in `open_array`."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(
        **{name: open_array(folder, prefix + name, entries[prefix + name], scattered=scattered) for name in names}
    )


def _plan(documents: Sequence[TokenizedConversation], shard_tokens: int) -> list[range]:
    """Documents of each shard: those that start in the same stretch of `shard_tokens`."""
    lengths = np.array([len(one) for one in documents])
    stretch = (np.cumsum(lengths) - lengths) // shard_tokens
    edges = [0, *(np.flatnonzero(np.diff(stretch)) + 1).tolist(), len(documents)]
    return [range(start, end) for start, end in pairwise(edges)]


def _stages(
    out: Path,
    documents: Sequence[TokenizedConversation],
    read: Callable[[range], Mapping[str, TokenMajorPairs]],
    directions: Tensor,
    vocabulary: Sequence[bytes],
    shards: Sequence[range],
    manifest: dict[str, Any],
) -> list[_Stage]:
    """All stages in their order; each looks up the files of those before it in the manifest when it runs."""
    skip_first, models = manifest["skip_first"], manifest["models"]
    starts = np.cumsum([0, *map(len, documents)])

    def corpus() -> merge.Entries:
        arrays = corpus_arrays(documents, manifest["datasets"], vocabulary, skip_first=skip_first)
        return write_arrays(out, arrays | neighbour_arrays(directions.detach().cpu().float(), N_NEIGHBOURS))

    def shard(index: int) -> merge.Entries:
        found = read(shards[index])
        first_row = int(starts[shards[index].start])
        entries: merge.Entries = {}
        for number, model in enumerate(models):
            _check(found.get(model), [documents[one] for one in shards[index]], model, len(directions), skip_first)
            name = f"unmerged-{index:05d}.{number}"
            entries |= merge.write_part(out, name, found[model], first_row=first_row, d_sae=len(directions))
        return entries

    def rows(number: int) -> merge.Entries:
        return merge.merge_rows(out, str(number), parts(number), manifest["files"])

    def latents(number: int) -> merge.Entries:
        loaded = load_arrays(CorpusArrays, out, manifest["files"])
        return merge.merge_latents(
            out, str(number), parts(number), manifest["files"], loaded, skip_first=manifest["skip_first"]
        )

    def coactive(number: int) -> merge.Entries:
        by_row = load_arrays(RowPairs, out, manifest["files"], f"{number}.")
        by_latent = load_arrays(LatentPairs, out, manifest["files"], f"{number}.")
        n_counted = int(load_arrays(CorpusArrays, out, manifest["files"]).role_tokens.sum())
        arrays = merge.coactive_arrays(by_row, by_latent, n_counted)
        return write_arrays(out, {f"{number}.{name}": array for name, array in arrays.items()})

    def parts(number: int) -> list[str]:
        return [f"unmerged-{index:05d}.{number}" for index in range(len(shards))]

    stages = [_Stage("the corpus", corpus)]
    stages += [_Stage(f"shard {index}", functools.partial(shard, index)) for index in range(len(shards))]
    for number, model in enumerate(models):
        of_rows, of_latents = (tuple(f"{part}.{kind}_" for part in parts(number)) for kind in ("row", "latent"))
        stages += [
            _Stage(f"latents of {model} by token", functools.partial(rows, number), of_rows),
            _Stage(f"latents of {model} by latent", functools.partial(latents, number), of_latents),
            _Stage(f"co-active latents of {model}", functools.partial(coactive, number)),
        ]
    return stages


def _check(
    pairs: TokenMajorPairs | None,
    documents: Sequence[TokenizedConversation],
    model: str,
    d_sae: int,
    skip_first: bool,
) -> None:
    """Refuse pairs that are not those of the documents."""
    lengths = torch.tensor([len(one) for one in documents])
    first = torch.zeros(int(lengths.sum()), dtype=torch.bool)
    first[(lengths.cumsum(0) - lengths)[lengths > 0]] = skip_first
    if pairs is None or pairs.n_tokens != len(first):
        expected = f"pairs of {len(first)} tokens"
    elif bool((pairs.tokens.diff() < 0).any() or ((pairs.tokens < 0) | (pairs.tokens >= len(first))).any()):
        expected = f"tokens from 0 to {len(first) - 1}, ascending"
    elif bool(((pairs.latents < 0) | (pairs.latents >= d_sae)).any()):
        expected = f"latents from 0 to {d_sae - 1}"
    elif bool((pairs.values == 0).any()):
        expected = "activations other than 0"
    elif bool(first[pairs.tokens].any()):
        expected = "none on first positions, with skip_first"
    elif not bool(torch.isfinite(pairs.values).all()):
        raise NonFiniteError(f"latents of {model} are not finite from conversation {documents[0].id!r} on")
    else:
        return
    raise InputError("read", expected=expected, received=f"others for {model}", remedy="mend what reads the pairs")
