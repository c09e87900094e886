"""From shards of pairs to arrays over the whole corpus: by row, by latent, and who fires with whom.

Memory is some 60 bytes a pair, of at most `BUCKET_PAIRS` pairs at a time or those of the most active latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt16, UInt32

from saetools.latents.arrays import SIZE_BITS, ArrayWriter, from_bits, open_array, to_bits, write_arrays
from saetools.latents.corpus import CorpusArrays
from saetools.latents.pairs import LatentPairs, RowPairs
from saetools.sae.sparse import TokenMajorPairs

BUCKET_PAIRS = 1 << 22
N_TOP_DOCUMENTS = 16
N_COACTIVE = 16
SAMPLE_ROWS = 1024
"""Rows of a latent on which other latents are counted: all of its own or as many, evenly from strong to weak ones."""
_BUCKET_LATENTS = 1 << 16  # numbers of 16 bits are sorted by radix

Entries = dict[str, dict[str, Any]]


def write_part(folder: Path, name: str, pairs: TokenMajorPairs, *, first_row: int, d_sae: int) -> Entries:
    """One model's pairs of one shard, in both orders; returns the entries of the files."""
    latents = pairs.latents.numpy().astype(np.uint16 if d_sae <= 1 << 16 else np.uint32)
    bits, rows = to_bits(pairs.values), pairs.tokens.numpy()
    order = np.argsort(latents, kind="stable")
    return write_arrays(
        folder,
        {
            f"{name}.row_counts": np.bincount(rows, minlength=pairs.n_tokens).astype(np.uint32),
            f"{name}.row_latents": latents,
            f"{name}.row_values": bits,
            f"{name}.latent_counts": np.bincount(latents, minlength=d_sae).astype(np.uint32),
            f"{name}.latent_rows": (rows[order] + first_row).astype(np.uint32),
            f"{name}.latent_values": bits[order],
        },
    )


def merge_rows(folder: Path, model: str, parts: Sequence[str], entries: Entries) -> Entries:
    """The pairs of all shards one after the other."""

    def each(field: str) -> Iterator[Shaped[np.ndarray, " some"]]:
        return (open_array(folder, f"{part}.{field}", entries[f"{part}.{field}"]).copy() for part in parts)

    counts = np.concatenate(list(each("row_counts")))
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    written = write_arrays(folder, {f"{model}.row_starts": starts})
    for field in ("row_latents", "row_values"):
        dtype = np.dtype(entries[f"{parts[0]}.{field}"]["dtype"])
        with ArrayWriter(folder, f"{model}.{field}", dtype, (int(starts[-1]),)) as file:
            for piece in each(field):
                file.append(piece)
        written[f"{model}.{field}"] = file.entry
    return written


def merge_latents(
    folder: Path, model: str, parts: Sequence[str], entries: Entries, corpus: CorpusArrays, *, skip_first: bool
) -> Entries:
    """The pairs of all shards sorted by latent, those of a latent by size, then by row; with sums over them."""
    shards = [_Shard(folder, part, entries) for part in parts]
    counts = np.zeros(len(shards[0].open("counts")), np.int64)
    for shard in shards:
        counts += shard.open("counts")
    starts = np.concatenate([[0], np.cumsum(counts)])
    lengths = corpus.counted_tokens(skip_first)
    buckets, sums = _buckets(starts), []
    with ExitStack() as files:
        rows, values = (
            files.enter_context(
                ArrayWriter(folder, f"{model}.latent_{field}", np.dtype(f"uint{bits}"), (int(starts[-1]),))
            )
            for field, bits in (("rows", 32), ("values", 16))
        )
        for first, last in buckets:
            bucket = _gather(shards, first, last)
            sums.append(_sums(bucket, last - first, corpus, lengths))
            order = np.argsort(~bucket.bits & SIZE_BITS, kind="stable")
            order = order[np.argsort(bucket.latents[order], kind="stable")]
            rows.append(bucket.rows[order])
            values.append(bucket.bits[order])
    whole = {f"{model}.{field}": np.concatenate([each[field] for each in sums]) for field in sums[0]}
    written = write_arrays(folder, {f"{model}.latent_starts": starts} | whole)
    return written | {f"{model}.latent_rows": rows.entry, f"{model}.latent_values": values.entry}


def coactive_arrays(by_row: RowPairs, by_latent: LatentPairs, n_counted: int) -> dict[str, Shaped[np.ndarray, "*_"]]:
    """For each latent those with the largest cosine of activations over the corpus, and how often they join it.

    Both come from at most `SAMPLE_ROWS` of its rows, so of a latent with more they are estimates.
    """
    d_sae = len(by_latent.squares)
    n = min(N_COACTIVE, d_sae - 1)
    active = by_latent.counts.sum((1, 2))
    norms = np.sqrt(by_latent.squares)
    others, measures = np.zeros((d_sae, n), np.uint32), np.zeros((d_sae, n, 3), np.float32)
    for latent in np.flatnonzero(active):
        rows, values = by_latent.of(int(latent))
        chosen = np.linspace(0, len(rows) - 1, min(SAMPLE_ROWS, len(rows))).round().astype(np.int64)
        chosen = chosen[np.argsort(rows[chosen])]  # read in the order of the file
        owners, latents, acts = by_row.at(rows[chosen])
        share = np.bincount(latents, minlength=d_sae) / len(chosen)
        products = np.bincount(latents, acts * from_bits(values[chosen])[owners], minlength=d_sae)
        cosines = products * (active[latent] / len(chosen)) / np.maximum(norms[latent] * norms, 1e-30)
        cosines[share == 0] = cosines[latent] = -np.inf
        top = np.argpartition(-cosines, n - 1)[:n]
        top = top[np.argsort(-cosines[top], kind="stable")]
        top = top[np.isfinite(cosines[top])]
        others[latent, : len(top)] = top
        mutual = np.log(share[top] * n_counted / active[top])
        measures[latent, : len(top)] = np.stack([share[top], mutual, cosines[top]], 1)
    return {"coactive": others, "coactive_measures": measures}


@dataclass(frozen=True)
class _Shard:
    """A shard's pairs, by latent and row; opened for each look, since a process may hold few files open."""

    folder: Path
    part: str
    entries: Entries

    def open(self, field: str) -> Shaped[np.ndarray, " some"]:
        name = f"{self.part}.latent_{field}"
        return open_array(self.folder, name, self.entries[name])


@dataclass(frozen=True)
class _Bucket:
    """The pairs of some latents, by latent and row; latents count from the first of these."""

    latents: UInt16[np.ndarray, " pair"]
    rows: UInt32[np.ndarray, " pair"]
    bits: UInt16[np.ndarray, " pair"]


def _buckets(starts: Int[np.ndarray, " latent_or_end"]) -> list[tuple[int, int]]:
    """Ranges of latents with few enough pairs, or of a single latent."""
    ranges, first, d_sae = [], 0, len(starts) - 1
    while first < d_sae:
        last = int(np.searchsorted(starts, starts[first] + BUCKET_PAIRS, "right")) - 1
        last = min(max(last, first + 1), first + _BUCKET_LATENTS, d_sae)
        ranges.append((first, last))
        first = last
    return ranges


def _gather(shards: Sequence[_Shard], first: int, last: int) -> _Bucket:
    latents, rows, bits = [], [], []
    for shard in shards:
        before, counts = np.split(shard.open("counts")[:last], [first])
        start = int(before.sum(dtype=np.int64))
        span = slice(start, start + int(counts.sum(dtype=np.int64)))
        latents.append(np.repeat(np.arange(last - first, dtype=np.uint16), counts))
        rows.append(shard.open("rows")[span].copy())
        bits.append(shard.open("values")[span].copy())
    joined = np.concatenate(latents)
    order = np.argsort(joined, kind="stable")
    return _Bucket(joined[order], np.concatenate(rows)[order], np.concatenate(bits)[order])


def _sums(
    bucket: _Bucket, n: int, corpus: CorpusArrays, lengths: Int[np.ndarray, " document"]
) -> dict[str, Shaped[np.ndarray, "*_"]]:
    """The fields of `LatentPairs` that sum up, of n latents."""
    values, latents = from_bits(bucket.bits), bucket.latents.astype(np.int64)
    shape = (n, *corpus.role_tokens.shape)
    cells = latents * corpus.role_tokens.size + corpus.groups(bucket.rows)
    n_cells = n * corpus.role_tokens.size
    documents = corpus.row_documents[bucket.rows]
    new = np.concatenate([[True], (np.diff(latents) != 0) | (np.diff(documents) != 0)])[: len(latents)]
    runs = np.flatnonzero(new)
    means = np.add.reduceat(np.abs(values), runs, dtype=np.float64) / lengths[documents[runs]] if len(runs) else runs
    return {
        "counts": np.bincount(cells, minlength=n_cells).reshape(shape),
        "sums": np.bincount(cells, values, minlength=n_cells).reshape(shape),
        "squares": np.bincount(latents, np.square(values, dtype=np.float64), minlength=n),
        "n_documents": np.bincount(latents[runs], minlength=n),
        **_top_documents(latents[runs], documents[runs], means.astype(np.float32), n),
    }


def _top_documents(
    latents: Int[np.ndarray, " run"], documents: UInt32[np.ndarray, " run"], means: Float[np.ndarray, " run"], n: int
) -> dict[str, Shaped[np.ndarray, "*_"]]:
    top, top_means = np.zeros((n, N_TOP_DOCUMENTS), np.uint32), np.zeros((n, N_TOP_DOCUMENTS), np.float32)
    ends = np.searchsorted(latents, np.arange(n + 1))
    for latent, (start, end) in enumerate(pairwise(ends)):
        some = means[start:end]
        best = np.argsort(-some, kind="stable")[:N_TOP_DOCUMENTS]
        top[latent, : len(best)] = documents[start:end][best]
        top_means[latent, : len(best)] = some[best]
    return {"top_documents": top, "top_document_means": top_means}
