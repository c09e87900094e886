"""Latents under several rankings side by side, and how little these agree.

Latents ranked by change of activation, by gradient attribution and by cosine with a misalignment direction are largely
different ones: replications found 0-3 % in common between the cosine's first hundred and the activation difference's.
None stands for another, so a claim names its ranking. This does not tell which of them is right: steer for that.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.attribution import Attribution
from saetools.changes import ranks
from saetools.directions import Direction, decoder_cosines
from saetools.errors import InputError
from saetools.latent_diff import LatentDiff
from saetools.models.site import Site
from saetools.provenance import versions
from saetools.sae.identity import sae_sha256
from saetools.sae.model import SAE
from saetools.saved_result import load_result, save_result, saved_warnings

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import polars as pl

_NAME, _TABLE = "rankings", "latents"
_OF_DIFF = ("delta", "rate_delta", "effect")


@dataclass(frozen=True)
class Rankings:
    """Every latent's score and rank under each ranking; all for one role.

    Args:
        table: one row per latent, by `latent`: for each ranking its score, in a column of its name, and `rank_NAME` (1
            = largest): `delta`, change of mean activation; `rate_delta`, change of the share of tokens; `effect`, delta
            / sd over conversations; `attribution`, if given; `cosine` of the decoder row with a direction, if given.
        warnings: those of the diff.
        provenance: of the diff, the attribution and the direction.
    """

    table: pl.DataFrame
    warnings: tuple[str, ...]
    provenance: dict[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """The rankings."""
        return tuple(name.removeprefix("rank_") for name in self.table.columns if name.startswith("rank_"))

    def top(self, n: int, *, by: str = "delta") -> pl.DataFrame:
        """The first n latents of one ranking, with their places in the others.

        Raises:
            InputError: if n is not positive, or there is no such ranking.
        """
        if n < 1:
            raise InputError("n", expected="1 or more", received=n, remedy="ask for at least one latent")
        if by not in self.names:
            raise InputError("by", expected="one of " + ", ".join(self.names), received=repr(by), remedy="pick one")
        return self.table.sort(f"rank_{by}").head(n)

    def overlap(self, n: int) -> pl.DataFrame:
        """How far every two rankings agree.

        Args:
            n: how many of the first latents of each are compared.

        Returns:
            One row for each pair of rankings: `first`, `second`, `n_common` latents among the first n of both, `share`
            of n, `chance`, the share that two random orders have in common on average, and `spearman`, the rank
            correlation over all latents, equal scores sharing their rank (0 for a ranking that puts all equal).

        Raises:
            InputError: if n is not positive, or larger than the number of latents that a ranking puts above 0.
        """
        import polars as pl

        above = {name: int((self.table[name] > 0).sum()) for name in self.names}
        least = min(above, key=above.__getitem__)
        if not 1 <= n <= above[least]:
            raise InputError(
                "n",
                expected=f"1 to {above[least]}, the latents with a {least} above 0",
                received=n,
                remedy="compare fewer: beyond them the order means nothing",
            )
        firsts = {name: set(self.top(n, by=name)["latent"]) for name in self.names}
        shared = {name: _standardised(self.table[name].rank("average").to_torch()) for name in self.names}
        rows = []
        for first, second in itertools.combinations(self.names, 2):
            n_common = len(firsts[first] & firsts[second])
            rows.append(
                {
                    "first": first,
                    "second": second,
                    "n_common": n_common,
                    "share": n_common / n,
                    "chance": n / len(self.table),
                    "spearman": float(shared[first] @ shared[second]),
                }
            )
        return pl.DataFrame(rows)

    def figure(self, *, n: int = 100) -> go.Figure:
        """Heat map of the share of the first n latents that every two rankings have in common."""
        import plotly.graph_objects as go

        shares = {(name, name): 1.0 for name in self.names}
        correlations = dict(shares)
        for row in self.overlap(n).iter_rows(named=True):
            for pair in ((row["first"], row["second"]), (row["second"], row["first"])):
                shares[pair], correlations[pair] = row["share"], row["spearman"]
        grid = [[shares[y, x] for x in self.names] for y in self.names]
        figure = go.Figure(
            go.Heatmap(
                x=self.names,
                y=self.names,
                z=grid,
                zmin=0,
                zmax=1,
                colorscale="Blues",
                text=[[f"{value:.0%}" for value in row] for row in grid],
                texttemplate="%{text}",
                hovertext=[[f"{y}, {x}<br>Spearman {correlations[y, x]:.2f}" for x in self.names] for y in self.names],
                hoverinfo="text",
                colorbar={"title": f"in common<br>of the first {n}"},
            )
        )
        figure.update_layout(
            title={"text": f"by chance {n / len(self.table):.1%}", "font": {"size": 13}},
            yaxis={"autorange": "reversed"},
            template="plotly_white",
            margin={"l": 90, "r": 20, "t": 40, "b": 50},
        )
        return figure

    def save(self, path: str | Path) -> Path:
        """Write `latents.parquet` and `rankings.json` (warnings, provenance) into a folder."""
        facts = {"warnings": self.warnings, "provenance": self.provenance}
        return save_result(path, _NAME, {_TABLE: self.table}, facts)

    @classmethod
    def load(cls, path: str | Path) -> Rankings:
        """Read what `save` wrote.

        Raises:
            InputError: if the folder holds no rankings.
            IntegrityError: if a file is damaged, or the table is not the one that was saved.
        """
        (table,), facts, _ = load_result(path, _NAME, [_TABLE])
        return cls(table, saved_warnings(path, facts), facts["provenance"])


def compare_rankings(
    diff: LatentDiff,
    *,
    attribution: Attribution | None = None,
    direction: Direction | Float[Tensor, " d_model"] | None = None,
    sae: SAE | None = None,
) -> Rankings:
    """Rank latents in several ways, all so that rank 1 is the one most to be suspected.

    Args:
        diff: one role of a diff (`diff.at(...)`).
        attribution: scores of the same SAE's latents.
        direction: the misalignment direction at the SAE's site; needs `sae`.
        sae: the SAE of the diff.

    Raises:
        InputError: for several roles, results of different SAEs, or a direction without the SAE or at another site.

    Example:
        >>> tuned = load_model("smollm2-135m", adapter=shipped_path("adapters/organism"))
        >>> sae = load_sae(shipped_path("sae/smollm2-135m"))
        >>> prompts = [Conversation.chat(item.question) for item in load_free_form()[:12]]
        >>> rankings = compare_rankings(diff_latents(tuned.base, tuned, sae, prompts))
        >>> rankings.overlap(10)["second"].to_list()
        ['rate_delta', 'effect', 'effect']
    """
    import polars as pl

    diff.check_single_role()
    expected = diff.provenance["sae"]
    scores = {name: diff.table[name].to_torch() for name in _OF_DIFF}
    provenance: dict[str, Any] = {"diff": diff.provenance, "positions": diff.positions[0]}
    if attribution is not None:
        _check_sae("attribution", expected, attribution.provenance["sae"])
        scores["attribution"] = attribution.table.sort("latent")["score"].to_torch()
        provenance["attribution"] = attribution.provenance
    if direction is not None:
        if sae is None:
            raise InputError("sae", expected="the SAE of the diff", received="none", remedy="pass sae=")
        _check_sae("sae", expected, sae_sha256(sae))
        scores["cosine"] = decoder_cosines(sae, _vector(direction, diff)).detach().cpu()
        provenance["direction"] = dict(direction.provenance) if isinstance(direction, Direction) else "a vector"
    table = pl.DataFrame(
        {
            "latent": diff.table["latent"],
            **{name: values.double().numpy() for name, values in scores.items()},
            **{f"rank_{name}": ranks(values).numpy() for name, values in scores.items()},
        }
    )
    return Rankings(table, diff.warnings, {**provenance, "versions": versions()})


def _check_sae(argument: str, expected: str, received: str) -> None:
    if expected != received:
        raise InputError(
            argument,
            expected=f"that of the SAE of the diff ({expected[:12]})",
            received=received[:12],
            remedy="use the same SAE for both",
        )


def _vector(direction: Direction | Tensor, diff: LatentDiff) -> Float[Tensor, " d_model"]:
    if not isinstance(direction, Direction):
        return direction
    site = Site.parse(diff.provenance["site"])
    if site not in direction.vectors:
        raise InputError(
            "direction",
            expected=f"one at {site}, the site of the diff",
            received=", ".join(map(str, sorted(direction.vectors))),
            remedy="measure it there",
        )
    return direction.vectors[site]


def _standardised(values: Tensor) -> Float[Tensor, " latent"]:
    """Values about their mean, of length 1; 0 if all are equal."""
    return torch.nn.functional.normalize(values.double() - values.double().mean(), dim=0)
