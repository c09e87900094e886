"""Latents that only the tuned model has, told from artefacts of the crosscoder that shows them.

An SAE of the base model cannot show what the fine-tune newly wrote. A crosscoder trained on both models can: its
latents have a decoder row in each, and one with hardly any row in the base is a candidate. Many candidates of
crosscoders with an L1 loss are artefacts (BatchTopK has few), so each is tested by latent scaling (arXiv 2504.02922):

    nu_error = beta_error(base) / beta_error(tuned): large where the base has the feature and its row was shrunk
    nu_recon = beta_recon(base) / beta_recon(tuned): large where other latents write it into the base

It does not tell whether a latent does anything: steer. Rows and activations are compared in raw units, so the two
residual streams should be about as loud as each other, as those of a model and its fine-tune are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.errors import InputError
from saetools.provenance import versions
from saetools.sae.crosscoder import Crosscoder
from saetools.sae.identity import sae_sha256
from saetools.sae.latent_scaling import scale_latents
from saetools.saved_result import load_result, save_result

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import polars as pl

VERDICTS = ("tuned_only", "artefact", "shared", "base_only", "rare")
_NAME, _TABLE = "tuned_only", "latents"


@dataclass(frozen=True)
class TunedOnly:
    """Which of a crosscoder's latents the base model lacks.

    Args:
        table: one row per latent, by `latent`: decoder lengths `norm_base`, `norm_tuned` and `relative_norm`, the
            tuned model's share of them; `cosine` between the two rows; `rate` and `mean` of its activation over all
            tokens, `n_active` tokens; `nu_error`, `nu_recon` (null where they are not defined); `verdict`:
            `tuned_only`; `artefact`: hardly any row in the base, but the base has the feature, in which case `artefact`
            says by what: `shrinkage`, `decoupling` or `both` (a ratio that is not defined counts as large); `shared`:
            rows in both; `base_only`: hardly any row in the tuned model, not tested further; `rare`: active on too few
            tokens to tell.
        provenance: crosscoder, models, tokens, thresholds, versions.
    """

    table: pl.DataFrame
    provenance: dict[str, Any]

    def of(self, verdict: str) -> pl.DataFrame:
        """The latents with a verdict, the most frequent first.

        Raises:
            InputError: for an unknown verdict.
        """
        import polars as pl

        if verdict not in VERDICTS:
            raise InputError(
                "verdict", expected="one of " + ", ".join(VERDICTS), received=repr(verdict), remedy="pick one of these"
            )
        return self.table.filter(pl.col("verdict") == verdict).sort("rate", descending=True, maintain_order=True)

    def figure(self) -> go.Figure:
        """Both ratios of all candidates, by verdict, with the thresholds."""
        import plotly.graph_objects as go

        figure = go.Figure()
        for verdict in ("tuned_only", "artefact"):
            table = self.of(verdict)
            figure.add_scatter(
                x=table["nu_recon"],
                y=table["nu_error"],
                mode="markers",
                name=verdict.replace("_", " "),
                hovertext=[
                    f"latent {row['latent']}<br>active on {row['rate']:.2%} of tokens"
                    for row in table.iter_rows(named=True)
                ],
            )
        thresholds = self.provenance["thresholds"]
        figure.add_vline(x=thresholds["max_nu_recon"], line_dash="dot")
        figure.add_hline(y=thresholds["max_nu_error"], line_dash="dot")
        figure.update_layout(
            xaxis_title="nu_recon, base / tuned",
            yaxis_title="nu_error, base / tuned",
            template="plotly_white",
            margin={"l": 60, "r": 20, "t": 20, "b": 50},
        )
        return figure

    def save(self, path: str | Path) -> Path:
        """Write `latents.parquet` and `tuned_only.json` (provenance) into a folder."""
        return save_result(path, _NAME, {_TABLE: self.table}, {"provenance": self.provenance})

    @classmethod
    def load(cls, path: str | Path) -> TunedOnly:
        """Read what `save` wrote.

        Raises:
            InputError: if the folder holds no such table.
            IntegrityError: if a file is damaged, or the table is not the one that was saved.
        """
        (table,), facts, _ = load_result(path, _NAME, [_TABLE])
        return cls(table, facts["provenance"])


def find_tuned_only(
    crosscoder: Crosscoder,
    batches: Iterable[Float[Tensor, "_ 2 d_model"]],
    *,
    max_norm_ratio: float = 0.2,
    max_nu_error: float = 0.2,
    max_nu_recon: float = 0.5,
    min_active: int = 10,
) -> TunedOnly:
    """Sort a crosscoder's latents into those of the tuned model alone, artefacts, and shared ones.

    The defaults of the first three thresholds are those of arXiv 2504.02922 (its norm difference of 0.9 is a norm ratio
    of 0.2).

    Args:
        crosscoder: trained on the base and the tuned model, in this order.
        batches: activations of both on the same tokens, such as
            `PairedActivations([base, tuned]).at(site).epoch_batches(4096, seed=0)`; best ones it was not trained on.
        max_norm_ratio: a latent is a candidate if its row in the base is at most so long, in lengths of its row in the
            tuned model; the other way round, it is the base's alone.
        max_nu_error: a candidate at or above it is an artefact by shrinkage.
        max_nu_recon: a candidate at or above it is an artefact by decoupling.
        min_active: latents active on fewer tokens are `rare`.

    Raises:
        InputError: for a crosscoder of other than two models, no tokens, or thresholds that make no sense.
        NonFiniteError: if an activation is NaN or infinite.
    """
    thresholds = {
        "max_norm_ratio": max_norm_ratio,
        "max_nu_error": max_nu_error,
        "max_nu_recon": max_nu_recon,
        "min_active": min_active,
    }
    if not 0 <= max_norm_ratio < 1:
        raise InputError(
            "max_norm_ratio", expected="0 or more, below 1", received=max_norm_ratio, remedy="0.2 is usual"
        )
    if min_active < 1:
        raise InputError("min_active", expected="1 or more", received=min_active, remedy="10 is usual")
    scaling = scale_latents(crosscoder, batches)
    ratios = {"error": scaling.beta_error, "recon": scaling.beta_recon}
    # A latent that does not even explain the tuned model has no ratio to speak of.
    nu = {name: torch.where(beta[1] > 0, beta[0] / beta[1], torch.nan) for name, beta in ratios.items()}
    norms = crosscoder.decoder_norms().detach().double().cpu()
    base, tuned = crosscoder.decoders.detach().double().cpu()
    shrunken, decoupled = ~(nu["error"] < max_nu_error), ~(nu["recon"] < max_nu_recon)
    candidate = norms[0] <= max_norm_ratio * norms[1]
    kinds = [
        (scaling.n_active < min_active, "rare", ""),
        (~candidate & (norms[1] <= max_norm_ratio * norms[0]), "base_only", ""),
        (~candidate, "shared", ""),
        (shrunken & decoupled, "artefact", "both"),
        (shrunken, "artefact", "shrinkage"),
        (decoupled, "artefact", "decoupling"),
        (torch.ones_like(candidate), "tuned_only", ""),
    ]
    first = torch.stack([holds for holds, _, _ in kinds]).int().argmax(0).tolist()
    provenance = {
        "crosscoder": sae_sha256(crosscoder.sae),
        "models": list(crosscoder.models),
        "site": crosscoder.sae.metadata.site,
        "n_tokens": scaling.n_tokens,
        "acts_sha256": scaling.acts_sha256,
        "thresholds": thresholds,
        "versions": versions(),
    }
    columns = {
        "norm_base": norms[0],
        "norm_tuned": norms[1],
        "relative_norm": crosscoder.relative_norms()[1].detach().double().cpu(),
        "cosine": torch.cosine_similarity(base, tuned, dim=1),
        "rate": scaling.n_active / scaling.n_tokens,
        "mean": scaling.mean,
        "n_active": scaling.n_active,
        "nu_error": nu["error"],
        "nu_recon": nu["recon"],
    }
    return TunedOnly(_table(columns, [kinds[index][1:] for index in first]), provenance)


def _table(columns: dict[str, Tensor], verdicts: list[tuple[str, str]]) -> pl.DataFrame:
    import polars as pl

    return pl.DataFrame(
        {
            "latent": range(len(verdicts)),
            **{name: values.numpy() for name, values in columns.items()},
            "verdict": [verdict for verdict, _ in verdicts],
            "artefact": [kind for _, kind in verdicts],
        }
    ).with_columns(pl.col("nu_error", "nu_recon", "relative_norm").fill_nan(None))
