"""The value of a diff: latents of base and tuned model side by side, by token role, and whether to trust it.

`saetools.diff` makes it; rankings, consensus, matching and reports read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from saetools.adequacy import Adequacy
from saetools.changes import FDR
from saetools.data.roles import Positions
from saetools.errors import InputError
from saetools.latent_scatter import scatter_latents
from saetools.saved_result import load_result, save_result

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import polars as pl

_NAME, _TABLES = "diff", ("latents", "conversations")


@dataclass(frozen=True)
class LatentDiff:
    """Base against tuned, latent by latent, at the positions of one or several roles.

    Args:
        table: one row per role and latent, by `positions` and `latent`: `mean_base`, `mean_tuned` (activation, averaged
            over the tokens of a conversation and then over conversations), `rate_base`, `rate_tuned` (share of tokens
            on which it is active, averaged alike), `max_base`, `max_tuned` and the quantiles `p50_base` to `p99_tuned`
            (of its sizes over the tokens where it is active); `delta` = mean_tuned - mean_base with its 95 % interval
            `low`, `high` (bootstrap-t over conversations) and standard error `se`, `effect` = delta / sd over
            conversations (0 if the sd is), `rate_delta`, `n_active` = conversations in which it is active in either
            model, `p_value` (two-sided; see `changes.change_p_values`) and `q_value` (the false discovery rate at which
            it counts as changed), both null for latents with too few of them, `rank` (1 = largest increase),
            `n_conversations`. Ends of intervals are null where the bootstrap does not determine them.
        conversations: one row for each role, conversation and latent that is active there in either model:
            `positions`, `conversation` (index), `latent`, `base`, `tuned` (mean activation over its tokens).
        adequacy: whether the SAE sees the change, by role.
        provenance: models, SAE, data, positions, settings, seed, versions.
    """

    table: pl.DataFrame
    conversations: pl.DataFrame
    adequacy: Mapping[Positions, Adequacy]
    provenance: dict[str, Any]

    @property
    def positions(self) -> tuple[Positions, ...]:
        """The roles that were read."""
        return tuple(self.adequacy)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why not to trust it, with the role that each concerns; empty if nothing speaks against it."""
        return tuple(text for role in self.positions for text in self._warnings(role))

    def _warnings(self, role: Positions) -> list[str]:
        import polars as pl

        found = list(self.adequacy[role].warnings)
        here = self.table.filter(pl.col("positions") == role)
        if here["q_value"].null_count() == len(here):
            n, least = here["n_conversations"][0], self.provenance["config"]["min_active"]
            found.append(untested(n, "conversations", least))
        return [f"{role}: {text}" for text in found]

    def at(self, positions: Positions) -> LatentDiff:
        """The same for one role.

        Raises:
            InputError: for a role that was not read.
        """
        import polars as pl

        if positions not in self.adequacy:
            raise InputError(
                "positions",
                expected="one of " + ", ".join(self.positions),
                received=repr(positions),
                remedy="pick one that was read, or diff again",
            )
        here = pl.col("positions") == positions
        return LatentDiff(
            self.table.filter(here),
            self.conversations.filter(here),
            {positions: self.adequacy[positions]},
            self.provenance,
        )

    def top(self, n: int, *, decreases: bool = False) -> pl.DataFrame:
        """The n largest increases, or decreases, of mean activation at one role; largest first.

        Raises:
            InputError: if n is not positive, or several roles were read.
        """
        if n < 1:
            raise InputError("n", expected="1 or more", received=n, remedy="ask for at least one latent")
        self.check_single_role()
        return self.table.sort("delta", descending=not decreases, maintain_order=True).head(n)

    def rates(self) -> Float[Tensor, " d_sae"]:
        """Firing rate of every latent at one role, the mean of both models': by it `certify_latents` matches controls.

        Raises:
            InputError: if several roles were read.
        """
        self.check_single_role()
        return ((self.table["rate_base"] + self.table["rate_tuned"]) / 2).to_torch().float()

    def figure(self, *, n_labels: int = 10) -> go.Figure:
        """Change against effect size at one role, one dot per latent that fires at all, the largest named.

        Raises:
            InputError: if several roles were read.
        """
        import polars as pl

        self.check_single_role()
        table = self.table.filter((pl.col("rate_base") > 0) | (pl.col("rate_tuned") > 0))
        falling = self.table.sort("delta", maintain_order=True).head(n_labels // 2)
        named = {*self.top(n_labels)["latent"], *falling["latent"]}
        hover = [
            f"latent {row['latent']}<br>delta {row['delta']:.3f} {in_brackets(row['low'], row['high'])}"
            f"<br>active on {row['rate_base']:.1%} -> {row['rate_tuned']:.1%} of tokens"
            for row in table.iter_rows(named=True)
        ]
        titles = ("change of mean activation, tuned - base", "effect size (change / sd over conversations)")
        return scatter_latents(table, "delta", "effect", named=named, hover=hover, titles=titles)

    def save(self, path: str | Path) -> Path:
        """Write `latents.parquet`, `conversations.parquet`, `tensors.safetensors` (what the SAE does not see) and
        `diff.json` (all else) into a folder.
        """
        facts = {
            "provenance": self.provenance,
            "warnings": self.warnings,
            "adequacy": {role: one.to_json() for role, one in self.adequacy.items()},
        }
        tables = dict(zip(_TABLES, (self.table, self.conversations), strict=True))
        tensors: dict[str, Tensor] = {role: one.rest_directions for role, one in self.adequacy.items()}
        return save_result(path, _NAME, tables, facts, tensors=tensors)

    @classmethod
    def load(cls, path: str | Path) -> LatentDiff:
        """Read what `save` wrote.

        Raises:
            InputError: if the folder holds no diff.
            IntegrityError: if a file is damaged, or is not the one that was saved.
        """
        (table, conversations), facts, rest = load_result(path, _NAME, _TABLES, has_tensors=True)
        adequacy: dict[Any, Adequacy] = {
            role: Adequacy.from_json(one, rest[role]) for role, one in facts["adequacy"].items()
        }
        return cls(table, conversations, adequacy, facts["provenance"])

    def summary(self, n: int) -> dict[str, Any]:
        """The n largest increases and decreases of each role, with adequacy, warnings and provenance, as plain values.

        Raises:
            InputError: if n is not positive.
        """
        import polars as pl

        change = pl.col("delta")
        return {
            "warnings": list(self.warnings),
            "positions": {
                role: {
                    "adequacy": one.to_json(),
                    "n_tested": int(self.at(role).table["q_value"].is_not_null().sum()),
                    "n_changed": int((self.at(role).table["q_value"] <= FDR).sum()),
                    "top": self.at(role).top(n).filter(change > 0).drop("positions").to_dicts(),
                    "decreases": self.at(role).top(n, decreases=True).filter(change < 0).drop("positions").to_dicts(),
                }
                for role, one in self.adequacy.items()
            },
            "provenance": self.provenance,
        }

    def check_single_role(self) -> None:
        """Refuse several roles.

        Raises:
            InputError: if several were read.
        """
        if len(self.adequacy) != 1:
            raise InputError(
                "positions", expected="one role", received=", ".join(self.positions), remedy="pick one with .at(...)"
            )


def untested(n_units: int, unit: str, min_active: int) -> str:
    """The warning that no latent could be tested."""
    return (
        f"no latent was tested: none is active in min_active={min_active} of the {n_units} {unit}; read more of them, "
        "or lower min_active"
    )


def in_brackets(low: float | None, high: float | None) -> str:
    """An interval in brackets; an end that is not known as a question mark."""
    return "[{}, {}]".format(*("?" if end is None else f"{end:.3f}" for end in (low, high)))
