"""What several fine-tunes have in common: latents that rise in all of them, and those of one domain alone.

Latents are ranked by the mean of their ranks over the organisms chosen for selection. Selecting and testing on the same
organisms overstates separation, so organisms that are held out only tell how the selected latents fare there. Organisms
read on the same conversations share the sampling error of these: a held-out one confirms across fine-tunes, not across
texts. A latent in the shared core is common to the fine-tunes, which may be their style as well as their persona.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.changes import FDR, ranks
from saetools.data.roles import Positions
from saetools.errors import InputError
from saetools.latent_diff import LatentDiff
from saetools.provenance import versions
from saetools.saved_result import load_result, save_result, saved_warnings
from saetools.significance import false_discovery_rates, mean_p_values
from saetools.stats import bootstrap_weights

if TYPE_CHECKING:
    import polars as pl

_NAME, _TABLES = "consensus", ("latents", "held_out", "replication")
_CHUNK = 64  # resamples whose mean changes exist at the same time, [resample, d_sae]


@dataclass(frozen=True)
class Consensus:
    """What the diffs of several organisms agree on, at one role.

    Args:
        table: one row per latent, by `latent`: `mean_rank` over the selection organisms and `rank` by it (1 = highest),
            `delta` averaged over them, `n_changed` organisms in which it has changed (q_value up to 0.05), `kind`:
            `core` (changed in all, in the same direction), `specific` (in one only, which `organism` names, and there
            otherwise than in every other one), `undecided` (in one only, but it may have changed as much in another),
            `mixed` (in several but not all, or in both directions) or `none`; `q_differs`, for those that changed in
            one only, the false discovery rate at which that change differs from that of every other organism, paired
            over conversations, null where they were read on others; `stability`, the share of resamples of
            conversations in which it is among the first `n_top`.
        held_out: one row for each held-out organism and each of the `n_top` selected latents, best first: `organism`,
            `latent`, `delta` with `low` and `high`, `p_value`, `q_value` and `rank`, all as in its diff.
        replication: one row per held-out organism: `organism`, `n_selected`, `n_rising` of them that rise there with
            q_value up to 0.05, their `share`, and `share_of_all`, the same among all latents.
        warnings: those of every diff, with its organism.
        provenance: of every diff, organisms, settings, versions.
    """

    table: pl.DataFrame
    held_out: pl.DataFrame
    replication: pl.DataFrame
    warnings: tuple[str, ...]
    provenance: dict[str, Any]

    def top(self, n: int) -> pl.DataFrame:
        """The n latents with the highest mean ranks.

        Raises:
            InputError: if n is not positive.
        """
        if n < 1:
            raise InputError("n", expected="1 or more", received=n, remedy="ask for at least one latent")
        return self.table.sort("rank").head(n)

    def core(self) -> pl.DataFrame:
        """The latents that changed in all selection organisms in the same direction, highest first."""
        import polars as pl

        return self.table.filter(pl.col("kind") == "core").sort("rank")

    def specific(self, organism: str) -> pl.DataFrame:
        """The latents that changed in one selection organism, and otherwise than in the others, highest first.

        Raises:
            InputError: if it is none of them.
        """
        import polars as pl

        if organism not in self.provenance["selection"]:
            raise InputError(
                "organism",
                expected="one of " + ", ".join(self.provenance["selection"]),
                received=repr(organism),
                remedy="pick one that latents were selected on",
            )
        return self.table.filter(pl.col("organism") == organism).sort("rank")

    def save(self, path: str | Path) -> Path:
        """Write `latents.parquet`, `held_out.parquet`, `replication.parquet` and `consensus.json` into a folder."""
        tables = dict(zip(_TABLES, (self.table, self.held_out, self.replication), strict=True))
        return save_result(path, _NAME, tables, {"warnings": self.warnings, "provenance": self.provenance})

    @classmethod
    def load(cls, path: str | Path) -> Consensus:
        """Read what `save` wrote.

        Raises:
            InputError: if the folder holds no consensus.
            IntegrityError: if a file is damaged, or is not the one that was saved.
        """
        (table, held_out, replication), facts, _ = load_result(path, _NAME, _TABLES)
        return cls(table, held_out, replication, saved_warnings(path, facts), facts["provenance"])


def find_consensus(
    diffs: Mapping[str, LatentDiff],
    *,
    positions: Positions | None = None,
    held_out: Collection[str] = (),
    n_top: int = 100,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Consensus:
    """Rank latents over several organisms, and see what the first of them do in others.

    Args:
        diffs: by organism, such as its domain; all of one SAE at one site.
        positions: the role; may be left out where one was read.
        held_out: organisms that take no part in the selection.
        n_top: how many latents are selected.
        n_resamples: bootstrap resamples of conversations, for the stability. Organisms that were read on the same
            conversations are resampled together.
        seed: of the bootstrap.

    Raises:
        InputError: for fewer than two selection organisms, unknown ones, or diffs of different SAEs, sites or roles.
    """
    found = _one_role(diffs, positions)
    selection = [name for name in found if name not in set(held_out)]
    _check(found, selection, held_out, n_top, n_resamples)
    chosen = {name: found[name] for name in selection}
    deltas = torch.stack([one.table["delta"].to_torch() for one in chosen.values()])
    mean_rank = torch.stack([one.table["rank"].to_torch() for one in chosen.values()]).double().mean(0)
    rank = ranks(-mean_rank)
    changed = torch.stack([(one.table["q_value"].fill_null(1.0) <= FDR).to_torch() for one in chosen.values()])
    q_differs = _differences(list(chosen.values()), changed)
    kinds, organisms = _kinds(changed, deltas, q_differs, selection)
    selected = torch.argsort(rank)[:n_top].tolist()
    stability = _stability(list(chosen.values()), min(n_top, len(rank)), n_resamples, seed)
    table = _table(mean_rank, rank, deltas.mean(0), changed.sum(0), stability, kinds, organisms, q_differs)
    rest = {name: found[name] for name in found if name not in chosen}
    provenance = {
        "diffs": {name: one.provenance for name, one in found.items()},
        "positions": next(iter(found.values())).positions[0],
        "selection": selection,
        "held_out": list(rest),
        "n_top": n_top,
        "n_resamples": n_resamples,
        "seed": seed,
        "versions": versions(),
    }
    warnings = tuple(f"{name}: {text}" for name, one in found.items() for text in one.warnings)
    return Consensus(table, _held_out(rest, selected), _replication(rest, selected), warnings, provenance)


def _one_role(diffs: Mapping[str, LatentDiff], positions: Positions | None) -> dict[str, LatentDiff]:
    found = {name: one if positions is None else one.at(positions) for name, one in diffs.items()}
    for one in found.values():
        one.check_single_role()
    return found


def _check(
    diffs: Mapping[str, LatentDiff],
    selection: Sequence[str],
    held_out: Collection[str],
    n_top: int,
    n_resamples: int,
) -> None:
    if unknown := sorted(set(held_out) - set(diffs)):
        raise InputError(
            "held_out", expected="some of " + ", ".join(diffs), received=unknown[0], remedy="pass its diff as well"
        )
    if len(selection) < 2:
        raise InputError(
            "diffs",
            expected="two or more organisms that are not held out",
            received=len(selection),
            remedy="pass more diffs: a single one has ranks of its own",
        )
    for name, value in (("n_top", n_top), ("n_resamples", n_resamples)):
        if value < 1:
            raise InputError(name, expected="1 or more", received=value, remedy="see the default")
    first = diffs[selection[0]]
    for name, one in diffs.items():
        for fact in ("sae", "site"):
            if one.provenance[fact] != first.provenance[fact]:
                raise InputError(
                    "diffs",
                    expected=f"one {fact} for all, {first.provenance[fact]!r} as of {selection[0]}",
                    received=f"{one.provenance[fact]!r} of {name}",
                    remedy="diff with the same SAE, or match SAEs (matching.match_latents)",
                )
        if one.positions != first.positions:
            raise InputError(
                "positions",
                expected=f"{first.positions[0]!r} for all, as of {selection[0]}",
                received=f"{one.positions[0]!r} of {name}",
                remedy="name the role with positions=",
            )


def _differences(diffs: Sequence[LatentDiff], changed: Tensor) -> Float[Tensor, " d_sae"]:
    """For latents that changed in one organism: the false discovery rate at which it differs from all others; NaN else.

    That a change is significant in one and not in the other does not make it differ (Gelman and Stern 2006).
    """
    d_sae = changed.shape[1]
    alone = changed.sum(0) == 1
    q_values = torch.full((d_sae,), math.nan, dtype=torch.double)
    if len({one.provenance["data_sha256"] for one in diffs}) > 1:
        return q_values
    seen = torch.cat([one.conversations["conversation"].to_torch().long() for one in diffs])
    n = 1 + int(seen.max()) if len(seen) else 1
    parts = []
    for one in diffs:
        rows = one.conversations
        units, latents = rows["conversation"].to_torch().long(), rows["latent"].to_torch().long()
        parts.append((latents * n + units, (rows["tuned"] - rows["base"]).to_torch().double()))
    worst = torch.zeros(changed.shape, dtype=torch.double)
    for pair in itertools.combinations(range(len(diffs)), 2):
        (keys, mine), (other_keys, theirs) = (parts[place] for place in pair)
        found, index = torch.unique(torch.cat([keys, other_keys]), return_inverse=True)
        values = torch.zeros(len(found), dtype=torch.double).index_add_(0, index, torch.cat([mine, -theirs]))
        p_values = mean_p_values(values, found // n, d_sae)
        for place in pair:
            worst[place] = torch.maximum(worst[place], p_values)
    own = worst.gather(0, changed.int().argmax(0, keepdim=True))[0]
    q_values[alone] = false_discovery_rates(own[alone])
    return q_values


def _kinds(
    changed: Tensor, deltas: Tensor, q_differs: Tensor, selection: Sequence[str]
) -> tuple[list[str], list[str | None]]:
    """What each latent is, and the organism of one that changed in it alone."""
    n_changed = changed.sum(0)
    same = (deltas > 0).all(0) | (deltas < 0).all(0)

    def kind(n: int, agrees: bool, q: float) -> str:
        if n < 2:
            return "none" if n == 0 else "specific" if q <= FDR else "undecided"
        return "core" if n == len(selection) and agrees else "mixed"

    kinds = [kind(*facts) for facts in zip(n_changed.tolist(), same.tolist(), q_differs.tolist(), strict=True)]
    only = changed.int().argmax(0).tolist()
    return kinds, [selection[index] if kind == "specific" else None for kind, index in zip(kinds, only, strict=True)]


def _stability(diffs: Sequence[LatentDiff], n_top: int, n_resamples: int, seed: int) -> Float[Tensor, " d_sae"]:
    """How often each latent's mean rank is among the first in resamples of conversations."""
    d_sae = len(diffs[0].table)
    data = [one.provenance["data_sha256"] for one in diffs]
    weights, changes = {}, []
    for place, (one, read) in enumerate(zip(diffs, data, strict=True)):
        n = int(one.table["n_conversations"][0])
        if read not in weights:  # conversations of one set of data are drawn together
            weights[read] = bootstrap_weights(n, n_resamples, seed=seed + place)
        # Where no latent is active, a conversation has no row: any number that is left stands for it.
        known = sorted(
            set().union(*(set(d.conversations["conversation"]) for d, r in zip(diffs, data, strict=True) if r == read))
        )
        unit = torch.full((known[-1] + 1 if known else 0,), -1)
        unit[known] = torch.arange(len(known))
        rows = one.conversations
        keys = torch.stack([rows["latent"].to_torch().long(), unit[rows["conversation"].to_torch().long()]])
        values = (rows["tuned"] - rows["base"]).to_torch()
        changes.append(torch.sparse_coo_tensor(keys, values, (d_sae, n), check_invariants=True).coalesce())
    hits = torch.zeros(d_sae, dtype=torch.double)
    for start in range(0, n_resamples, _CHUNK):
        total = torch.zeros(min(_CHUNK, n_resamples - start), d_sae, dtype=torch.double)
        for own, read in zip(changes, data, strict=True):
            means = torch.sparse.mm(own, weights[read][start : start + _CHUNK].T).T
            order = torch.argsort(-means, dim=1, stable=True)
            total.scatter_add_(1, order, torch.arange(1.0, d_sae + 1, dtype=torch.double).expand_as(total))
        firsts = torch.argsort(total, dim=1, stable=True)[:, :n_top]
        hits += torch.bincount(firsts.flatten(), minlength=d_sae)
    return hits / n_resamples


def _table(
    mean_rank: Tensor,
    rank: Tensor,
    delta: Tensor,
    n_changed: Tensor,
    stability: Tensor,
    kinds: Sequence[str],
    organisms: Sequence[str | None],
    q_differs: Tensor,
) -> pl.DataFrame:
    import polars as pl

    table = pl.DataFrame(
        {
            "latent": range(len(rank)),
            "mean_rank": mean_rank.numpy(),
            "rank": rank.numpy(),
            "delta": delta.numpy(),
            "n_changed": n_changed.numpy(),
            "kind": list(kinds),
            "organism": pl.Series(organisms, dtype=pl.String),
            "q_differs": q_differs.numpy(),
            "stability": stability.numpy(),
        }
    )
    return table.with_columns(pl.col("q_differs").fill_nan(None))


_HELD_OUT = ("latent", "delta", "low", "high", "p_value", "q_value", "rank")


def _held_out(diffs: Mapping[str, LatentDiff], selected: Sequence[int]) -> pl.DataFrame:
    import polars as pl

    parts = [
        one.table.sort("latent")[list(selected)].select(pl.lit(name).alias("organism"), *_HELD_OUT)
        for name, one in diffs.items()
    ]
    types = {"organism": pl.String, "latent": pl.Int64, **dict.fromkeys(_HELD_OUT[1:-1], pl.Float64), "rank": pl.Int64}
    return pl.concat([pl.DataFrame(schema=types), *parts])


def _replication(diffs: Mapping[str, LatentDiff], selected: Sequence[int]) -> pl.DataFrame:
    import polars as pl

    rows = []
    for name, one in diffs.items():
        table = one.table.sort("latent")
        rising = ((table["q_value"].fill_null(1.0) <= FDR) & (table["delta"] > 0)).to_torch()
        n_rising = int(rising[list(selected)].sum())
        rows.append((name, len(selected), n_rising, n_rising / len(selected), float(rising.double().mean())))
    schema = {
        "organism": pl.String,
        "n_selected": pl.Int64,
        "n_rising": pl.Int64,
        "share": pl.Float64,
        "share_of_all": pl.Float64,
    }
    return pl.DataFrame(rows, schema=schema, orient="row")
