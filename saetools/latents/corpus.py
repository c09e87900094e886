"""The tokens of a corpus as arrays: whose they are, and where each token of the vocabulary stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer, Shaped, UInt8, UInt32

from saetools.data.tokenizing import TokenizedConversation
from saetools.errors import InputError
from saetools.latents.arrays import pack_texts, texts_at


@dataclass(frozen=True)
class CorpusArrays:
    """Tokens of all documents, one after the other; a row is a token.

    Args:
        token_ids: of each row.
        roles: `Role` flags of each row.
        row_documents: document of each row.
        document_starts: first row of each document, and their end.
        document_datasets: index of each document's dataset.
        document_names: ids of documents, packed.
        document_names_starts: where each starts.
        vocabulary: bytes of the tokens, packed.
        vocabulary_starts: where each starts.
        token_rows: counted rows, by token id.
        token_rows_starts: where the rows of each token id start, and their end.
        role_values: the roles that occur.
        role_tokens: counted rows of each dataset with each of them.
        neighbours: of each latent, those with the nearest decoder rows, nearest first.
        neighbour_cosines: their cosines.
    """

    token_ids: UInt32[np.ndarray, " row"]
    roles: UInt8[np.ndarray, " row"]
    row_documents: UInt32[np.ndarray, " row"]
    document_starts: Int[np.ndarray, " document_or_end"]
    document_datasets: UInt32[np.ndarray, " document"]
    document_names: UInt8[np.ndarray, " byte"]
    document_names_starts: Int[np.ndarray, " document_or_end"]
    vocabulary: UInt8[np.ndarray, " letter"]
    vocabulary_starts: Int[np.ndarray, " token_or_end"]
    token_rows: UInt32[np.ndarray, " counted"]
    token_rows_starts: Int[np.ndarray, " token_or_end"]
    role_values: UInt8[np.ndarray, " role"]
    role_tokens: Int[np.ndarray, "dataset role"]
    neighbours: UInt32[np.ndarray, "d_sae neighbour"]
    neighbour_cosines: Shaped[np.ndarray, "d_sae neighbour"]

    def name(self, document: int) -> str:
        """The id of a document."""
        (raw,) = texts_at(self.document_names, self.document_names_starts, np.array([document]))
        return raw.decode(errors="surrogatepass")

    def documents_of(self, rows: Integer[np.ndarray, " some"]) -> Int[np.ndarray, " some"]:
        """The documents of rows that lie far apart: `document_starts` is small, `row_documents` a page for each."""
        found: Int[np.ndarray, " some"] = np.searchsorted(self.document_starts, rows, "right") - 1
        return found

    def document_of(self, row: int) -> int:
        """The document of a row."""
        return int(np.searchsorted(self.document_starts, row, "right")) - 1

    def spellings(self, tokens: Integer[np.ndarray, " some"]) -> list[bytes]:
        """The bytes of token ids."""
        return texts_at(self.vocabulary, self.vocabulary_starts, tokens)

    def counted_tokens(self, skip_first: bool) -> Int[np.ndarray, " document"]:
        """Tokens of each document, without its first one if these are left out."""
        lengths: Int[np.ndarray, " document"] = np.diff(self.document_starts) - skip_first
        return lengths.clip(0)

    def groups(self, rows: UInt32[np.ndarray, " some"]) -> Int[np.ndarray, " some"]:
        """Dataset and role of rows as one number, that of the cell in `role_tokens`."""
        cells: Int[np.ndarray, " some"] = self.document_datasets[self.row_documents[rows]].astype(np.int64)
        cells *= len(self.role_values)
        cells += np.searchsorted(self.role_values, self.roles[rows])
        return cells


def corpus_arrays(
    documents: Sequence[TokenizedConversation],
    datasets: Sequence[str],
    vocabulary: Sequence[bytes],
    *,
    skip_first: bool,
) -> dict[str, Shaped[np.ndarray, "*_"]]:
    """All arrays of `CorpusArrays` but the neighbours.

    Args:
        documents: the corpus; each names its dataset as `source`.
        datasets: the datasets.
        vocabulary: bytes of each token id.
        skip_first: whether first positions are left out of what is counted.

    Raises:
        InputError: for a token id beyond the vocabulary, or more than 2^32 tokens.
    """
    lengths = np.array([len(one) for one in documents])
    n_rows = int(lengths.sum())
    if n_rows >= 2**32:
        raise InputError("corpus", expected="less than 2^32 tokens", received=n_rows, remedy="index a part of it")
    token_ids = torch.cat([one.token_ids for one in documents]).numpy().astype(np.uint32)
    if int(token_ids.max()) >= len(vocabulary):
        raise InputError(
            "vocabulary",
            expected=f"more than {token_ids.max()} tokens, as the corpus has",
            received=len(vocabulary),
            remedy="pass the vocabulary of the tokenizer that split the corpus",
        )
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    number = {name: index for index, name in enumerate(datasets)}
    arrays: dict[str, Shaped[np.ndarray, "*_"]] = {
        "token_ids": token_ids,
        "roles": torch.cat([one.roles for one in documents]).numpy(),
        "row_documents": np.repeat(np.arange(len(documents), dtype=np.uint32), lengths),
        "document_starts": starts,
        "document_datasets": np.array([number[one.source] for one in documents], np.uint32),
        **pack_texts("document_names", [one.id.encode(errors="surrogatepass") for one in documents]),
        **pack_texts("vocabulary", vocabulary),
    }
    counted = np.ones(n_rows, bool)
    counted[starts[:-1][lengths > 0]] = not skip_first
    return arrays | _token_rows(token_ids, counted, len(vocabulary)) | _roles(arrays, counted, len(datasets))


def neighbour_arrays(directions: torch.Tensor, n: int) -> dict[str, Shaped[np.ndarray, "*_"]]:
    """For each unit decoder row the n others with the largest cosines, largest first."""
    latents, cosines = [], []
    n = min(n, len(directions) - 1)
    for first in range(0, len(directions), 512):
        some = directions[first : first + 512] @ directions.T
        some[torch.arange(len(some)), torch.arange(first, first + len(some))] = -torch.inf
        top = some.topk(n, dim=1)
        latents.append(top.indices.numpy().astype(np.uint32))
        cosines.append(top.values.numpy())
    return {"neighbours": np.concatenate(latents), "neighbour_cosines": np.concatenate(cosines)}


def _token_rows(
    token_ids: UInt32[np.ndarray, " row"], counted: Bool[np.ndarray, " row"], n_tokens: int
) -> dict[str, Shaped[np.ndarray, "*_"]]:
    rows = np.flatnonzero(counted)
    ids = token_ids[rows]
    starts = np.concatenate([[0], np.cumsum(np.bincount(ids, minlength=n_tokens))])
    return {
        "token_rows": rows[np.argsort(ids, kind="stable")].astype(np.uint32),
        "token_rows_starts": starts.astype(np.int64),
    }


def _roles(
    arrays: Mapping[str, Shaped[np.ndarray, "*_"]], counted: Bool[np.ndarray, " row"], n_datasets: int
) -> dict[str, Shaped[np.ndarray, "*_"]]:
    values, numbers = np.unique(arrays["roles"], return_inverse=True)
    datasets = arrays["document_datasets"][arrays["row_documents"]].astype(np.int64)
    cells = (datasets * len(values) + numbers)[counted]
    tokens = np.bincount(cells, minlength=n_datasets * len(values)).reshape(n_datasets, len(values))
    return {"role_values": values, "role_tokens": tokens.astype(np.int64)}
