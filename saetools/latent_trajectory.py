"""The value of a trajectory: how latents change from checkpoint to checkpoint, or with the scale of an adapter.

`saetools.trajectory` makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.saved_result import load_result, save_result, saved_warnings

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import polars as pl

Over = Literal["step", "scale"]
_NAME, _TABLES = "trajectory", ("latents", "curves")
_TENSORS = ("means", "latents", "changes")


@dataclass(frozen=True)
class Trajectory:
    """How latents change from point to point, always against the base.

    Args:
        over: what the points are: training `step`s or adapter `scale`s.
        points: ascending; the base itself is 0, and not among them.
        table: one row per latent, by `latent`: `change` at the last point; `n_active`, conversations in which it is
            active in the base or at a point (the largest number of any point); `p_value`, that it differs from the base
            at any point (as in a diff; smallest over points times their number) and `q_value`, both null for latents
            with too few of them; `onset`, null for latents that do not move (q_value above 0.05), the point up to which
            it is as in the base, and `shape`, how it then moves: `step` or `ramp`; `onset_low`, `onset_high`, the 95 %
            bootstrap interval over conversations, for those of `latents`.
        curves: one row for each of `latents` and each point: `latent`, `point`, `delta` with its 95 % interval `low`,
            `high`, null where the bootstrap does not determine it, and standard error `se`.
        means: mean change of every latent at every point.
        latents: those that are traced conversation by conversation.
        changes: their changes.
        warnings: why not to trust it, such as an SAE that is blind to the change at the last point.
        provenance: models, adapters, SAE, data, settings, versions.
    """

    over: Over
    points: tuple[float, ...]
    table: pl.DataFrame
    curves: pl.DataFrame
    means: Float[Tensor, "point d_sae"]
    latents: Int[Tensor, " traced"]
    changes: Float[Tensor, "point conversation traced"]
    warnings: tuple[str, ...]
    provenance: dict[str, Any]

    def onsets(self) -> pl.DataFrame:
        """The latents that move, earliest onset first, those with equal ones by the size of their change."""
        import polars as pl

        return self.table.drop_nulls("onset").sort("onset", -pl.col("change").abs(), maintain_order=True)

    def figure(self) -> go.Figure:
        """Heat map of the traced latents' changes in shares of the largest of each, by onset, which a cross marks."""
        import plotly.graph_objects as go
        import polars as pl

        traced = self.table.filter(pl.col("latent").is_in(self.latents.tolist())).sort(
            "onset", -pl.col("change").abs(), nulls_last=True, maintain_order=True
        )
        x = [f"{point:g}" for point in (0.0, *self.points)]
        names = [f"latent {latent}" for latent in traced["latent"]]
        deltas = torch.cat([torch.zeros(1, self.means.shape[1]), self.means])[:, traced["latent"].to_torch()].T
        largest = deltas.abs().amax(1, keepdim=True).clamp_min(1e-30)
        figure = go.Figure(
            go.Heatmap(
                x=x,
                y=names,
                z=(deltas / largest).tolist(),
                zmin=-1,
                zmax=1,
                colorscale="RdBu_r",
                text=[[f"{value:+.3f}" for value in row] for row in deltas.tolist()],
                hovertemplate="%{y}, " + self.over + " %{x}<br>change %{text}<extra></extra>",
                colorbar={"title": "change /<br>its largest"},
            )
        )
        marked = [(f"{onset:g}", name) for onset, name in zip(traced["onset"], names, strict=True) if onset is not None]
        figure.add_scatter(
            x=[onset for onset, _ in marked],
            y=[name for _, name in marked],
            mode="markers",
            marker={"symbol": "x-thin", "size": 7, "line": {"width": 1.5, "color": "#333"}},
            hoverinfo="skip",
            showlegend=False,
        )
        figure.update_layout(
            xaxis={"title": {"step": "training step", "scale": "adapter scale"}[self.over], "type": "category"},
            yaxis={"autorange": "reversed"},
            template="plotly_white",
            margin={"l": 100, "r": 20, "t": 20, "b": 50},
        )
        return figure

    def save(self, path: str | Path) -> Path:
        """Write `latents.parquet`, `curves.parquet`, `tensors.safetensors` and `trajectory.json` into a folder."""
        facts = {
            "over": self.over,
            "points": self.points,
            "warnings": self.warnings,
            "provenance": self.provenance,
        }
        tensors = {name: getattr(self, name) for name in _TENSORS}
        tables = dict(zip(_TABLES, (self.table, self.curves), strict=True))
        return save_result(path, _NAME, tables, facts, tensors=tensors)

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read what `save` wrote.

        Raises:
            InputError: if the folder holds no trajectory.
            IntegrityError: if a file is damaged, or is not the one that was saved.
        """
        (table, curves), facts, tensors = load_result(path, _NAME, _TABLES, has_tensors=True)
        warnings, provenance = saved_warnings(path, facts), facts["provenance"]
        points = tuple(facts["points"])
        return cls(facts["over"], points, table, curves, **tensors, warnings=warnings, provenance=provenance)
