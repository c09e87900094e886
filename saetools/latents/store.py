"""A latent store, opened: everything about a latent in milliseconds, from memory maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.data.roles import POSITIONS, select_positions
from saetools.errors import InputError, IntegrityError
from saetools.latents.arrays import from_bits
from saetools.latents.choose import Taken, first_of_documents, window
from saetools.latents.corpus import CorpusArrays
from saetools.latents.manifest import is_complete, read_manifest
from saetools.latents.pairs import CoactivePairs, LatentPairs, RowPairs
from saetools.latents.passage import Passage
from saetools.latents.record import (
    ActiveDocument,
    Activity,
    CoactiveLatent,
    DecoderNeighbour,
    LatentRecord,
    QuantileBin,
    TokenLatent,
)
from saetools.latents.vocabulary import spell
from saetools.latents.write import load_arrays
from saetools.provenance import sha256_of_file
from saetools.sae.sparse import TokenMajorPairs

_Arrays = TypeVar("_Arrays")
_OCCURRENCES = 4096  # of a token, on which its latents are counted


class LatentStore:
    """The latents of one or more models on the tokens of a corpus, opened for reading; no model is needed.

    Activations are rounded to bfloat16 (within 0.2 %); rates, means and cosines are those of the rounded ones.

    Args:
        path: the folder that `index_latents` wrote.

    Raises:
        IntegrityError: if the manifest or a file is missing or damaged.
        InputError: if the folder holds something else, or the run that wrote it was not finished.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        if manifest is None:
            raise IntegrityError(f"{self.path} holds no manifest of a latent store; index again")
        self.manifest: dict[str, Any] = manifest
        if not is_complete(manifest):
            raise InputError(
                "path",
                expected="a finished latent store",
                received=f"{self.path} after {manifest['done']} of {manifest['stages']} stages",
                remedy="run the same again; it continues",
            )
        try:
            self._corpus = load_arrays(CorpusArrays, self.path, manifest["files"], scattered=True)
            self._rows = self._of_models(RowPairs)
            self._latents = self._of_models(LatentPairs)
            self._coactive = self._of_models(CoactivePairs)
        except KeyError as error:
            raise IntegrityError(f"the manifest in {self.path} names no {error}; index again") from error

    def __len__(self) -> int:
        """Tokens of the corpus, first positions included."""
        return len(self._corpus.token_ids)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that read the corpus."""
        return tuple(self.manifest["models"])

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the datasets."""
        return tuple(self.manifest["datasets"])

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return int(self.manifest["d_sae"])

    def verify(self) -> None:
        """Compare every file's SHA-256 with the manifest.

        Raises:
            IntegrityError: naming the first file that differs.
        """
        for name, entry in self.manifest["files"].items():
            if sha256_of_file(self.path / f"{name}.npy") != entry["sha256"]:
                raise IntegrityError(f"{self.path / name}.npy has changed since it was written; index again")

    def open_latent(
        self,
        latent: int,
        *,
        model: str | None = None,
        n_top: int = 20,
        n_bins: int = 4,
        n_per_bin: int = 5,
        context: int = 24,
        seed: int = 0,
    ) -> LatentRecord:
        """Everything the store holds about a latent.

        Top passages are looked for among its 65,536 largest activations, so that there may be fewer than asked for,
        as where it is active in few documents.

        Args:
            latent: which.
            model: by whose activations passages, documents and co-active latents are chosen; by default the last one
                that was indexed. Passages show all models.
            n_top: passages around its largest activations.
            n_bins: equal parts of its active tokens.
            n_per_bin: random passages from each.
            context: tokens of a passage before and after the one it was chosen by, as far as the document goes.
            seed: of the random passages.

        Raises:
            InputError: for a latent or a model that the store does not have, or counts that are negative.
        """
        model = self._checked(latent, model)
        for name, value in (("n_top", n_top), ("n_bins", n_bins), ("n_per_bin", n_per_bin), ("context", context)):
            if value < 0:
                raise InputError(name, expected="0 or more", received=value, remedy="raise it")
        pairs = self._latents[model]
        rows, values = pairs.of(latent)
        top = first_of_documents(self._corpus, rows, n_top, int(pairs.n_documents[latent]))
        taken = Taken(self._corpus, context)
        taken.add(top)
        bins = taken.choose_bins(rows, n_bins, n_per_bin, torch.Generator().manual_seed(seed))

        def passages(chosen: Iterable[int]) -> tuple[Passage, ...]:
            return tuple(self.passage(latent, row, context=context) for row in chosen)

        return LatentRecord(
            latent=latent,
            model=model,
            n_active=len(rows),
            n_documents=int(pairs.n_documents[latent]),
            max=float(from_bits(values[:1])[0]) if len(values) else 0.0,
            top=passages(top),
            bins=tuple(QuantileBin(low, high, passages(chosen)) for low, high, chosen in bins),
            activity=tuple(self._activity(latent)),
            documents=tuple(self._documents(latent, model)),
            coactive=tuple(self._coactive_latents(latent, model)),
            neighbours=tuple(self._neighbours(latent)),
        )

    def activations(self, latent: int, *, model: str | None = None) -> Float[Tensor, " active"]:
        """Activations of a latent on all tokens on which it is active, the one of the largest size first.

        Args:
            latent: which.
            model: in which; by default the last one that was indexed.

        Raises:
            InputError: for a latent or a model that the store does not have.
        """
        return torch.from_numpy(from_bits(self._latents[self._checked(latent, model)].of(latent)[1]))

    def active_latents(self, *, model: str | None = None) -> list[int]:
        """The latents that are active on some token.

        Args:
            model: in which; by default the last one that was indexed.

        Raises:
            InputError: for a model that the store does not have.
        """
        starts = self._latents[self._checked(0, model)].latent_starts
        return np.flatnonzero(np.diff(starts)).tolist()

    def inactive_passages(
        self, latent: int, n: int, *, model: str | None = None, context: int = 24, seed: int = 0
    ) -> tuple[Passage, ...]:
        """Random passages in which a latent is active on no token; for tests of what it is about.

        Args:
            latent: which.
            n: passages; there are fewer if 64 random ones for each did not have as many.
            model: in which it is inactive; by default the last one that was indexed.
            context: tokens before and after the random one.
            seed: of the choice.

        Raises:
            InputError: for a latent or a model that the store does not have, or a negative n.
        """
        model = self._checked(latent, model)
        found: list[Passage] = []
        if n < 0:
            raise InputError("n", expected="0 or more", received=n, remedy="raise it")
        drawn = torch.randint(len(self), (64 * n,), generator=torch.Generator().manual_seed(seed)).tolist()
        taken = Taken(self._corpus, context)
        for row in drawn:
            if len(found) == n:
                break
            if taken.choose([row], 1):
                passage = self.passage(latent, row, context=context)
                if not any(passage.acts[model]):
                    found.append(passage)
        return tuple(found)

    def passage(self, latent: int, row: int, *, context: int = 24) -> Passage:
        """The passage around a token of the corpus, with a latent's activations in all models.

        Args:
            latent: which.
            row: the token, counted from the start of the corpus.
            context: tokens before and after it, as far as the document goes.

        Raises:
            InputError: for a latent or a row that the store does not have.
        """
        self._checked(latent, None)
        if not 0 <= row < len(self):
            raise InputError("row", expected=f"0 to {len(self) - 1}", received=row, remedy="name a token of the corpus")
        corpus = self._corpus
        first, last = window(corpus, row, context)
        document = corpus.document_of(row)
        token_ids = corpus.token_ids[first:last]
        return Passage(
            dataset=self.datasets[corpus.document_datasets[document]],
            document=document,
            document_id=corpus.name(document),
            start=first - int(corpus.document_starts[document]),
            token_ids=tuple(token_ids.tolist()),
            tokens=spell(corpus.spellings(token_ids)),
            roles=tuple(corpus.roles[first:last].tolist()),
            peak=row - first,
            acts={model: tuple(pairs.of(latent, first, last).tolist()) for model, pairs in self._rows.items()},
        )

    def latents_at(self, rows: Int[Tensor, " row"], *, model: str | None = None) -> TokenMajorPairs:
        """All active latents on some tokens of the corpus.

        Args:
            rows: the tokens, counted from the start of the corpus.
            model: in which; by default the last one that was indexed.

        Raises:
            InputError: for rows or a model that the store does not have.
        """
        model = self._checked(0, model)
        if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < len(self)):
            raise InputError(
                "rows", expected=f"0 to {len(self) - 1}", received="others", remedy="name tokens of the corpus"
            )
        tokens, latents, values = map(torch.from_numpy, self._rows[model].at(rows.cpu().numpy()))
        return TokenMajorPairs(tokens, latents, values, n_tokens=len(rows))

    def latents_for_token(
        self, token: str | int, n: int = 10, *, model: str | None = None, by: Literal["mean", "information"] = "mean"
    ) -> tuple[TokenLatent, ...]:
        """The latents that a token of the vocabulary wakes most, from all its occurrences or 4,096 of them.

        Args:
            token: its text, with a leading space if it has one, or its id.
            n: latents.
            model: in which; by default the last one that was indexed.
            by: mean activation, which always active latents lead, or `rate * pmi`, which asks what the latent tells
                about the token.

        Returns:
            The latents that are active on it, the best first; none if the corpus does not have the token.

        Raises:
            InputError: for a text that is not one token, or a model that the store does not have.
        """
        model = self._checked(0, model)
        if by not in ("mean", "information"):
            raise InputError("by", expected="mean or information", received=repr(by), remedy="pick one")
        tokens, starts = self._tokens(token), self._corpus.token_rows_starts
        rows = np.concatenate([self._corpus.token_rows[starts[one] : starts[one + 1]] for one in tokens])
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _OCCURRENCES)).round().astype(np.int64)]
        if not len(rows):
            return ()
        _, latents, values = self._rows[model].at(rows)
        rates = np.bincount(latents, minlength=self.d_sae) / len(rows)
        means = np.bincount(latents, values, minlength=self.d_sae) / len(rows)
        active = np.flatnonzero(rates)
        overall = self._latents[model].counts[active].sum((1, 2)) / self._corpus.role_tokens.sum()
        pmis = np.log(rates[active] / overall)
        best = np.argsort(-(means[active] if by == "mean" else rates[active] * pmis), kind="stable")[:n]
        return tuple(
            TokenLatent(int(active[one]), float(rates[active[one]]), float(means[active[one]]), float(pmis[one]))
            for one in best
        )

    def _of_models(self, kind: type[_Arrays]) -> dict[str, _Arrays]:
        """The arrays of every model."""
        files, names = self.manifest["files"], enumerate(self.models)
        return {model: load_arrays(kind, self.path, files, f"{number}.", scattered=True) for number, model in names}

    def _checked(self, latent: int, model: str | None) -> str:
        """The model asked for, if it and the latent exist."""
        if not 0 <= latent < self.d_sae:
            raise InputError("latent", expected=f"0 to {self.d_sae - 1}", received=latent, remedy="name one of these")
        if model is not None and model not in self.models:
            raise InputError(
                "model", expected="one of " + ", ".join(self.models), received=repr(model), remedy="name one of these"
            )
        return self.models[-1] if model is None else model

    def _tokens(self, token: str | int) -> list[int]:
        """The ids of a token; several may have the same text."""
        starts = self._corpus.vocabulary_starts
        if isinstance(token, str):
            raw = token.encode()
            candidates = np.flatnonzero(np.diff(starts) == len(raw))
            spellings = self._corpus.spellings(candidates)
            found = [one for one, spelling in zip(candidates.tolist(), spellings, strict=True) if spelling == raw]
            if raw and found:
                return found
        elif 0 <= token < len(starts) - 1:
            return [token]
        raise InputError(
            "token",
            expected="the text or the id of one token of the vocabulary",
            received=repr(token),
            remedy="mind the leading space; split a longer text with the tokenizer and pass one id",
        )

    def _activity(self, latent: int) -> Iterator[Activity]:
        corpus = self._corpus
        roles = torch.from_numpy(corpus.role_values.copy())
        masks = {positions: select_positions(roles, positions).numpy() for positions in POSITIONS}
        for model, pairs in self._latents.items():
            for number, dataset in enumerate(self.datasets):
                for positions, mask in masks.items():
                    n_tokens = int(corpus.role_tokens[number][mask].sum())
                    if n_tokens:
                        count, total = (each[latent, number][mask].sum() for each in (pairs.counts, pairs.sums))
                        rate, mean = float(count / n_tokens), float(total / n_tokens)
                        yield Activity(model, dataset, positions, n_tokens, rate, mean)

    def _documents(self, latent: int, model: str) -> Iterator[ActiveDocument]:
        corpus, pairs = self._corpus, self._latents[model]
        means = pairs.top_document_means[latent]
        for document, mean in zip(pairs.top_documents[latent].tolist(), means.tolist(), strict=True):
            if mean > 0:
                dataset = self.datasets[corpus.document_datasets[document]]
                yield ActiveDocument(dataset, document, corpus.name(document), mean)

    def _coactive_latents(self, latent: int, model: str) -> Iterator[CoactiveLatent]:
        pairs = self._coactive[model]
        measures = pairs.coactive_measures[latent].tolist()
        for other, (rate, pmi, cosine) in zip(pairs.coactive[latent].tolist(), measures, strict=True):
            if rate > 0:
                yield CoactiveLatent(other, rate, pmi, cosine)

    def _neighbours(self, latent: int) -> Iterator[DecoderNeighbour]:
        cosines = self._corpus.neighbour_cosines[latent].tolist()
        return map(DecoderNeighbour, self._corpus.neighbours[latent].tolist(), cosines)
