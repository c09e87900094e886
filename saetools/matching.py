"""The same latents in two SAEs: by decoder rows, and by what they are active on; and whether both rise in a fine-tune.

Another SAE of the same site cuts the residual stream otherwise, so a persona that shows in one SAE only may be an
accident of its training. Latents are matched if each is the other's best: by cosine of the decoder rows, or by
correlation of the activations on the same tokens. A match says that two latents are alike, not that they are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.activations.stream import stream_activations
from saetools.changes import FDR
from saetools.data.conversation import Conversation
from saetools.data.roles import Positions, select_positions
from saetools.data.tokenizing import tokenize, tokens_sha256
from saetools.errors import InputError
from saetools.latent_diff import LatentDiff
from saetools.models.language_model import LanguageModel
from saetools.models.site import Site
from saetools.provenance import versions
from saetools.sae.identity import sae_sha256, sae_site
from saetools.sae.model import SAE
from saetools.saved_result import load_result, save_result, saved_warnings

if TYPE_CHECKING:
    import polars as pl

By = Literal["cosine", "correlation"]
_TABLE = "latents"
_ELEMENTS = 1 << 20  # of similarities, and of products of activations, that exist at the same time


@dataclass(frozen=True)
class Coactivation:
    """What the latents of two SAEs did on the same tokens, as pairs of a token and an active latent.

    Args:
        tokens_a: token of each pair of the first SAE.
        latents_a: its latent, ascending.
        values_a: its activation.
        tokens_b: token of each pair of the second SAE, ascending.
        latents_b: its latent.
        values_b: its activation.
        n_tokens: tokens in all.
        n_latents: latents of the first and of the second SAE.
        provenance: SAEs, model, data, versions.
    """

    tokens_a: Int[Tensor, " pair_a"]
    latents_a: Int[Tensor, " pair_a"]
    values_a: Float[Tensor, " pair_a"]
    tokens_b: Int[Tensor, " pair_b"]
    latents_b: Int[Tensor, " pair_b"]
    values_b: Float[Tensor, " pair_b"]
    n_tokens: int
    n_latents: tuple[int, int]
    provenance: dict[str, Any]

    def correlations(self, first: int, last: int, *, min_active: int = 10) -> Float[Tensor, "some d_b"]:
        """Pearson correlation over tokens of latents `first` to before `last` of the first SAE with all of the other's.

        Args:
            first: a latent.
            last: the one after the last.
            min_active: latents active on fewer tokens have a correlation of -infinity with all: too little to tell.
        """
        d_b = self.n_latents[1]
        starts = torch.searchsorted(self.tokens_b, torch.arange(self.n_tokens + 1))
        span = torch.searchsorted(self.latents_a, torch.tensor([first, last])).tolist()
        dots = torch.zeros((last - first) * d_b, dtype=torch.double)
        size = max(1, _ELEMENTS * self.n_tokens // max(1, len(self.tokens_b)))
        for begin in range(span[0], span[1], size):
            some = slice(begin, min(begin + size, span[1]))
            tokens = self.tokens_a[some].long()
            counts = starts[tokens + 1] - starts[tokens]
            owner = torch.repeat_interleave(torch.arange(len(tokens)), counts)
            place = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner] + starts[tokens][owner]
            cells = (self.latents_a[some].long()[owner] - first) * d_b + self.latents_b[place].long()
            dots.index_add_(0, cells, (self.values_a[some][owner] * self.values_b[place]).double())
        a, b = self._moments
        mean_a, sd_a, n_a = (values[first:last, None] for values in a)
        covariance = dots.view(last - first, d_b) / self.n_tokens - mean_a * b[0]
        known = (n_a >= min_active) & (b[2] >= min_active) & (sd_a * b[1] > 0)
        return torch.where(known, covariance / (sd_a * b[1]).clamp_min(1e-300), -torch.inf).float()

    @cached_property
    def _moments(self) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        """Of either SAE: every latent's mean and standard deviation over all tokens, and the tokens it is active on."""
        return tuple(
            _moments(latents.long(), values.double(), n, self.n_tokens)
            for latents, values, n in zip(
                (self.latents_a, self.latents_b), (self.values_a, self.values_b), self.n_latents, strict=True
            )
        )


def _moments(latents: Tensor, values: Tensor, n_latents: int, n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.zeros(2, n_latents, dtype=torch.double)
    mean, square = sums.index_add_(1, latents, torch.stack([values, values.square()])) / n_tokens
    return mean, (square - mean.square()).clamp_min(0).sqrt(), torch.bincount(latents, minlength=n_latents)


def measure_coactivation(
    lm: LanguageModel,
    a: SAE,
    b: SAE,
    conversations: Sequence[Conversation],
    *,
    positions: Positions = "all",
    sites: tuple[Site, Site] | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
    on_progress: Callable[[int, int], None] | None = None,
) -> Coactivation:
    """Read conversations once with both SAEs; first positions (attention sinks) do not count.

    Memory is 12 bytes for every token and active latent of either SAE. Some 100,000 tokens tell the correlations of
    all but rare latents.

    Args:
        lm: the model.
        a: an SAE.
        b: another one of the same model.
        conversations: what is read.
        positions: which tokens count: `prompt`, `last_prompt`, `header`, `response`, `template` or `all`.
        sites: where they read; by default what their metadata say.
        max_tokens: longer conversations are cut.
        batch_tokens: padded tokens of a forward pass.
        on_progress: called with conversations done and in all.

    Raises:
        InputError: for SAEs of other widths than the model, or no tokens at the positions.
    """
    for name, sae in (("a", a), ("b", b)):
        if sae.d_in != lm.d_model:
            raise InputError(
                name, expected=f"an SAE of width {lm.d_model}", received=sae.d_in, remedy="load SAEs of this model"
            )
    both = (sae_site(a), sae_site(b)) if sites is None else sites
    tokenized = list(tokenize(conversations, lm.tokenizer, max_tokens=max_tokens))
    pieces: tuple[list[Tensor], list[Tensor]] = ([], [])
    n_tokens = done = 0
    for block in stream_activations(lm, list(dict.fromkeys(both)), tokenized, batch_tokens=batch_tokens):
        chosen = select_positions(block.roles, positions)
        for own, sae, site in zip(pieces, (a, b), both, strict=True):
            latents = sae.encode(block.acts[site].to(sae.W_dec.device)[chosen.to(sae.W_dec.device)])
            token, slot = (latents.values != 0).nonzero().T
            own.append(torch.stack([token + n_tokens, latents.indices[token, slot]]).int().cpu())
            own.append(latents.values[token, slot].float().cpu())
        n_tokens += int(chosen.sum())
        done += len(torch.unique(block.documents))
        if on_progress is not None:
            on_progress(done, len(tokenized))
    if not n_tokens:
        raise InputError(
            "conversations",
            expected=f"tokens at {positions!r}",
            received="none",
            remedy="pass others, or other positions",
        )
    (tokens_a, latents_a), (tokens_b, latents_b) = (torch.cat(own[::2], dim=1) for own in pieces)
    values_a, values_b = (torch.cat(own[1::2]) for own in pieces)
    order = torch.argsort(latents_a, stable=True)
    provenance = {
        "model": lm.describe(),
        "saes": [sae_sha256(a), sae_sha256(b)],
        "sites": [str(site) for site in both],
        "positions": positions,
        "n_tokens": n_tokens,
        "data_sha256": tokens_sha256(tokenized, "token_ids"),
        "versions": versions(),
    }
    return Coactivation(
        tokens_a[order],
        latents_a[order],
        values_a[order],
        tokens_b,
        latents_b,
        values_b,
        n_tokens,
        (a.d_sae, b.d_sae),
        provenance,
    )


@dataclass(frozen=True)
class LatentMatches:
    """Every latent's counterpart in another SAE.

    Args:
        table: one row per latent of the first SAE, by `latent`: `by_cosine`, the latent of the second whose decoder row
            is nearest, `cosine` with it, and `mutual_cosine`, whether it is the nearest to that one as well; and, if
            co-activation was given, `by_correlation`, `correlation` and `mutual_correlation` alike. All are null where
            nothing is alike: without a cosine above 0, or active on too few tokens.
        provenance: SAEs, co-activation, versions.
    """

    table: pl.DataFrame
    provenance: dict[str, Any]

    def mutual(self, *, by: By = "cosine") -> pl.DataFrame:
        """Pairs of latents that are each other's best: `latent`, `match`, `similarity`; the most alike first.

        Raises:
            InputError: for correlations that were not measured.
        """
        import polars as pl

        if f"by_{by}" not in self.table.columns:
            raise InputError("by", expected="'cosine'", received=repr(by), remedy="match with coactivation=")
        found = self.table.filter(pl.col(f"mutual_{by}"))
        columns = ("latent", pl.col(f"by_{by}").alias("match"), pl.col(by).alias("similarity"))
        return found.select(*columns).sort("similarity", descending=True, maintain_order=True)

    def save(self, path: str | Path) -> Path:
        """Write `latents.parquet` and `matches.json` (provenance) into a folder."""
        return save_result(path, "matches", {_TABLE: self.table}, {"provenance": self.provenance})

    @classmethod
    def load(cls, path: str | Path) -> LatentMatches:
        """Read what `save` wrote.

        Raises:
            InputError: if the folder holds no matches.
            IntegrityError: if a file is damaged, or the table is not the one that was saved.
        """
        (table,), facts, _ = load_result(path, "matches", [_TABLE])
        return cls(table, facts["provenance"])


def match_latents(a: SAE, b: SAE, *, coactivation: Coactivation | None = None, min_active: int = 10) -> LatentMatches:
    """Find every latent's nearest one in another SAE, by decoder cosine and, if given, by co-activation.

    Args:
        a: an SAE.
        b: another one that writes to a stream of the same width.
        coactivation: of these two (`measure_coactivation`).
        min_active: latents active on fewer tokens have no match by co-activation.

    Raises:
        InputError: for SAEs of different widths, or the co-activation of others.

    Example:
        >>> sae = load_sae(shipped_path("sae/smollm2-135m"))
        >>> match_latents(sae, sae).mutual()["similarity"].min() > 0.99
        True
    """
    import polars as pl

    if a.d_out != b.d_out:
        raise InputError("b", expected=f"an SAE of width {a.d_out}", received=b.d_out, remedy="match SAEs of one model")
    names = [sae_sha256(a), sae_sha256(b)]
    if coactivation is not None and coactivation.provenance["saes"] != names:
        raise InputError(
            "coactivation", expected="that of these SAEs, in this order", received="another", remedy="measure it again"
        )
    rows_a, rows_b = a.directions().float().cpu(), b.directions().float().cpu()
    size = max(1, _ELEMENTS // b.d_sae)
    blocks: dict[str, Iterator[Tensor]] = {"cosine": (part @ rows_b.T for part in torch.split(rows_a, size))}
    if coactivation is not None:
        spans = ((first, min(first + size, a.d_sae)) for first in range(0, a.d_sae, size))
        blocks["correlation"] = (coactivation.correlations(*span, min_active=min_active) for span in spans)
    columns: dict[str, Any] = {"latent": range(a.d_sae)}
    for name, each in blocks.items():
        match, value, mutual = _best(each, b.d_sae)
        alike = (value > 0).tolist()
        columns[f"by_{name}"] = [one if good else None for one, good in zip(match.tolist(), alike, strict=True)]
        columns[name] = [one if good else None for one, good in zip(value.tolist(), alike, strict=True)]
        columns[f"mutual_{name}"] = [one if good else None for one, good in zip(mutual.tolist(), alike, strict=True)]
    provenance = {
        "saes": names,
        "coactivation": None if coactivation is None else coactivation.provenance,
        "min_active": min_active,
        "versions": versions(),
    }
    return LatentMatches(pl.DataFrame(columns), provenance)


def _best(blocks: Iterable[Tensor], d_b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row its largest column, the value there, and whether the row is the largest of that column as well."""
    matches, values = [], []
    best, owner, start = torch.full((d_b,), -torch.inf), torch.full((d_b,), -1), 0
    for block in blocks:
        value, match = block.max(1)
        matches.append(match)
        values.append(value)
        here, row = block.max(0)
        owner = torch.where(here > best, row + start, owner)
        best = torch.maximum(best, here)
        start += len(block)
    match = torch.cat(matches)
    return match, torch.cat(values), owner[match] == torch.arange(len(match))


@dataclass(frozen=True)
class AcrossSAEs:
    """Whether latents that rise in one SAE have counterparts that rise in another.

    Args:
        table: one row per mutual match of a latent that rises in the first SAE with q_value up to 0.05, the largest
            increase first: `latent`, `delta`, `rank`; `match`, `similarity`, `match_delta` with `match_low` and
            `match_high`, `match_q_value`, `match_rank`, and `rises`: whether the match has risen with q_value up to
            0.05, too.
        n_rising: latents that rise in the first SAE, with and without a match.
        share: of the rows, those whose match rises; NaN if there are none.
        share_of_all: the same share of all matched latents of the second SAE: what matching at random would give.
        warnings: those of both diffs, after `first SAE` or `second SAE`.
        provenance: both diffs, the matches, versions.
    """

    table: pl.DataFrame
    n_rising: int
    share: float
    share_of_all: float
    warnings: tuple[str, ...]
    provenance: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write `latents.parquet` and `across_saes.json` (all else) into a folder."""
        shares = {"n_rising": self.n_rising, "share": self.share, "share_of_all": self.share_of_all}
        facts = {**shares, "warnings": self.warnings, "provenance": self.provenance}
        return save_result(path, "across_saes", {_TABLE: self.table}, facts)

    @classmethod
    def load(cls, path: str | Path) -> AcrossSAEs:
        """Read what `save` wrote.

        Raises:
            InputError: if the folder holds no such result.
            IntegrityError: if a file is damaged, or the table is not the one that was saved.
        """
        (table,), facts, _ = load_result(path, "across_saes", [_TABLE])
        share, share_of_all = (math.nan if facts[key] is None else facts[key] for key in ("share", "share_of_all"))
        warnings = saved_warnings(path, facts)
        return cls(table, facts["n_rising"], share, share_of_all, warnings, facts["provenance"])


def compare_across_saes(
    diff_a: LatentDiff, diff_b: LatentDiff, matches: LatentMatches, *, by: By = "cosine"
) -> AcrossSAEs:
    """Look up, for the latents that rise in one SAE's diff, what their mutual matches do in the other's.

    Args:
        diff_a: one role of a diff with the first SAE.
        diff_b: the same role of a diff of the same models with the second; best on the same conversations.
        matches: of the two SAEs.
        by: which matches count.

    Raises:
        InputError: for several or different roles, diffs of other SAEs, or correlations that were not measured.
    """
    import polars as pl

    for diff in (diff_a, diff_b):
        diff.check_single_role()
    saes = [diff_a.provenance["sae"], diff_b.provenance["sae"]]
    if saes != matches.provenance["saes"] or diff_a.positions != diff_b.positions:
        raise InputError(
            "matches",
            expected="those of the SAEs of diff_a and diff_b, and diffs of one role",
            received=", ".join(
                f"{one[:12]} at {diff.positions[0]}" for one, diff in zip(saes, (diff_a, diff_b), strict=True)
            ),
            remedy="match the SAEs in the order of the diffs",
        )
    pairs = matches.mutual(by=by)
    rising = (pl.col("q_value") <= FDR) & (pl.col("delta") > 0)
    before = diff_a.table.filter(rising)
    after = diff_b.table.select(
        pl.col("latent").alias("match"),
        *(pl.col(name).alias(f"match_{name}") for name in ("delta", "low", "high", "q_value", "rank")),
        rising.fill_null(False).alias("rises"),
    )
    found = pairs.join(after, on="match", maintain_order="left")
    table = before.select("latent", "delta", "rank").join(found, on="latent", maintain_order="left").sort("rank")
    share, share_of_all = (int(one["rises"].sum()) / len(one) if len(one) else math.nan for one in (table, found))
    provenance = {
        "diffs": [diff_a.provenance, diff_b.provenance],
        "matches": matches.provenance,
        "by": by,
        "versions": versions(),
    }
    both = zip(("first SAE", "second SAE"), (diff_a, diff_b), strict=True)
    warnings = tuple(f"{name}: {text}" for name, diff in both for text in diff.warnings)
    return AcrossSAEs(table, len(before), share, share_of_all, warnings, provenance)
