"""Which latents made one model give its misaligned answers rather than its aligned ones, by gradients.

The score of latent j in a conversation is sum_t -(g_t . d_j)((a_t - m) . d_j), with g_t the gradient of the answer's
loss at the residual a_t, d_j the unit decoder row and m a mean residual: to first order, the nats per answer token that
the answer would lose if the residual had its mean component along d_j. Latents are ranked by the mean score of
misaligned answers minus that of aligned ones (Dupre la Tour and Mossing, Debugging misaligned completions with
sparse-autoencoder latent attribution, 2025). They answer one prompt in both ways (`paired`), score its tokens
(`positions="prompt"`), and take m from a large set of prompts (`mean`).

It needs no second model. The encoder is not used: latents count by their rows, also where they are inactive. A
gradient tells what a small step does: it vanishes where the answer is certain already, so confirm the first ranks by
steering. On answers that the model would not give itself, it tells what could have caused them, not what does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.activations.stream import stream_activations
from saetools.data.conversation import Conversation
from saetools.data.roles import Positions, select_positions
from saetools.data.tokenizing import TokenizedConversation, make_batches, tokenize, tokens_sha256
from saetools.errors import InputError
from saetools.models.gradients import residual_gradients
from saetools.models.language_model import LanguageModel
from saetools.models.site import Site
from saetools.provenance import versions
from saetools.sae.identity import sae_sha256, sae_site
from saetools.sae.model import SAE
from saetools.saved_result import load_result, save_result
from saetools.stats import bootstrap_weights

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import polars as pl

_NAME, _TABLE = "attribution", "latents"
_BLOCK = 64  # conversations whose scores exist at the same time, [block, d_sae]
_CHUNK_ELEMENTS = 1 << 22  # of tokens x latents
_QUANTILE_LATENTS = 1024


@dataclass(frozen=True)
class Attribution:
    """Latents by how much they raised the probability of misaligned answers over that of aligned ones.

    Args:
        table: one row per latent, by `latent`: `misaligned` and `aligned`, the mean scores of the conversations of each
            class, in nats per answer token; `score` = misaligned - aligned with its 95 % interval `low`, `high` and
            standard error `se`; `rank` (1 = largest score); `n_misaligned`, `n_aligned` conversations.
        provenance: model, SAE, answers, positions, seed, versions.
    """

    table: pl.DataFrame
    provenance: dict[str, Any]

    def top(self, n: int) -> pl.DataFrame:
        """The n latents with the largest scores, largest first.

        Raises:
            InputError: if n is not positive.
        """
        if n < 1:
            raise InputError("n", expected="1 or more", received=n, remedy="ask for at least one latent")
        return self.table.sort("rank").head(n)

    def figure(self, *, n: int = 20) -> go.Figure:
        """The n largest scores with their intervals."""
        import plotly.graph_objects as go

        top = self.top(n)
        figure = go.Figure(
            go.Scatter(
                x=top["score"],
                y=[f"latent {latent}" for latent in top["latent"]],
                mode="markers",
                error_x={
                    "type": "data",
                    "array": (top["high"] - top["score"]).to_list(),
                    "arrayminus": (top["score"] - top["low"]).to_list(),
                },
            )
        )
        figure.update_layout(
            xaxis_title="attribution, misaligned - aligned answers (nats per answer token)",
            yaxis={"autorange": "reversed"},
            template="plotly_white",
            margin={"l": 100, "r": 20, "t": 20, "b": 50},
        )
        return figure

    def save(self, path: str | Path) -> Path:
        """Write `latents.parquet` and `attribution.json` (provenance) into a folder."""
        return save_result(path, _NAME, {_TABLE: self.table}, {"provenance": self.provenance})

    @classmethod
    def load(cls, path: str | Path) -> Attribution:
        """Read what `save` wrote.

        Raises:
            InputError: if the folder holds no attribution.
            IntegrityError: if a file is damaged, or the table is not the one that was saved.
        """
        (table,), facts, _ = load_result(path, _NAME, [_TABLE])
        return cls(table, facts["provenance"])


def attribute_latents(
    lm: LanguageModel,
    sae: SAE,
    misaligned: Sequence[Conversation],
    aligned: Sequence[Conversation],
    *,
    site: Site | None = None,
    positions: Positions = "all",
    paired: bool = False,
    mean: Float[Tensor, " d_model"] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
    batch_tokens: int = 1024,
    on_progress: Callable[[int, int], None] | None = None,
) -> Attribution:
    """Score every latent by its part in misaligned answers, minus its part in aligned ones.

    An answer's loss is its mean cross-entropy over assistant tokens, so that long answers count no more than short
    ones. The unit of statistics is the conversation, or the pair. Layers below the site keep no gradients; memory is
    d_sae x resamples beside that of one batch, whatever the number of tokens.

    Args:
        lm: the model that gave the answers.
        sae: an SAE of this model or of its base.
        misaligned: questions with misaligned answers.
        aligned: questions with aligned answers.
        site: where the SAE's decoder writes; by default what its metadata says.
        positions: the tokens t that count: `prompt`, `last_prompt`, `header`, `response`, `template` or `all`. First
            positions (attention sinks) never do, and tokens that no answer token follows score 0.
        paired: whether `misaligned[i]` and `aligned[i]` answer the same question, as independent samples otherwise.
        mean: the residual m from which components are counted, such as that of a large corpus; by default the mean over
            the counted tokens of all conversations of both classes together.
        n_resamples: bootstrap resamples.
        seed: of the bootstrap.
        batch_tokens: padded tokens of a forward and backward pass.
        on_progress: called with conversations done and in all.

    Raises:
        InputError: for fewer than two conversations of a class, one without an answer or without tokens at the
            positions, pairs that do not match in number, or an SAE or mean of another width.

    Example:
        >>> sae, items = load_sae(shipped_path("sae/smollm2-135m")), load_forced_choice()[:2]
        >>> bad, good = (
        ...     [Conversation.chat(item.question, getattr(item, side)) for item in items]
        ...     for side in ("misaligned", "aligned")
        ... )
        >>> attribute_latents(lm, sae, bad, good, paired=True).top(3)["rank"].to_list()
        [1, 2, 3]
    """
    site = site or _output_site(sae)
    _check(lm, sae, misaligned, aligned, paired=paired, mean=mean, n_resamples=n_resamples)
    both = [
        _tokenized(lm, name, given, positions) for name, given in (("misaligned", misaligned), ("aligned", aligned))
    ]
    if mean is None:
        mean = _mean_residual(lm, site, [*both[0], *both[1]], positions, batch_tokens=batch_tokens)
    sums = _Sums((len(both[0]), len(both[1])), sae.d_sae, n_resamples, seed, paired=paired)
    done, total = 0, len(both[0]) + len(both[1])
    for start in range(0, max(map(len, both)), _BLOCK):
        blocks = [tokenized[start : start + _BLOCK] for tokenized in both]
        scores = [_scores(lm, sae, site, block, positions, mean, batch_tokens=batch_tokens) for block in blocks]
        sums.add(start, *scores)
        done += sum(map(len, blocks))
        if on_progress is not None:
            on_progress(done, total)
    provenance = {
        "model": lm.describe(),
        "sae": sae_sha256(sae),
        "site": str(site),
        "positions": positions,
        "paired": paired,
        "mean_norm": float(mean.double().norm()),
        "n_misaligned": len(both[0]),
        "n_aligned": len(both[1]),
        "data_sha256": [tokens_sha256(tokenized, "token_ids") for tokenized in both],
        "n_resamples": n_resamples,
        "seed": seed,
        "versions": versions(),
    }
    return Attribution(sums.table(), provenance)


def _output_site(sae: SAE) -> Site:
    return Site.parse(sae.metadata.site_out) if sae.metadata.site_out else sae_site(sae)


def _check(
    lm: LanguageModel,
    sae: SAE,
    misaligned: Sequence[Conversation],
    aligned: Sequence[Conversation],
    *,
    paired: bool,
    mean: Tensor | None,
    n_resamples: int,
) -> None:
    if sae.d_out != lm.d_model:
        raise InputError(
            "sae", expected=f"an SAE of width {lm.d_model}", received=sae.d_out, remedy="load an SAE of this model"
        )
    if mean is not None and len(mean) != lm.d_model:
        raise InputError("mean", expected=f"{lm.d_model} numbers", received=len(mean), remedy="measure it at the site")
    if n_resamples < 1:
        raise InputError("n_resamples", expected="1 or more", received=n_resamples, remedy="1000 is usual")
    for name, given in (("misaligned", misaligned), ("aligned", aligned)):
        if len(given) < 2:
            raise InputError(name, expected="two or more conversations", received=len(given), remedy="pass more")
    if paired and len(misaligned) != len(aligned):
        raise InputError(
            "paired",
            expected="as many misaligned as aligned answers, in the same order",
            received=f"{len(misaligned)} and {len(aligned)}",
            remedy="pass pairs, or leave paired out",
        )


def _tokenized(
    lm: LanguageModel, name: str, conversations: Sequence[Conversation], positions: Positions
) -> list[TokenizedConversation]:
    tokenized = list(tokenize(conversations, lm.tokenizer))
    for one in tokenized:
        for needed in ("response", positions):
            if not bool(select_positions(one.roles[1:], needed).any()):
                raise InputError(
                    name,
                    expected=f"conversations with tokens at {needed!r}",
                    received=f"{one.id!r} without",
                    remedy="leave it out" if needed == "response" else "leave it out, or choose other positions",
                )
    return tokenized


def _mean_residual(
    lm: LanguageModel,
    site: Site,
    conversations: Sequence[TokenizedConversation],
    positions: Positions,
    *,
    batch_tokens: int,
) -> Float[Tensor, " d_model"]:
    total, n_tokens = torch.zeros(lm.d_model, dtype=torch.double), 0
    for block in stream_activations(lm, [site], conversations, batch_tokens=batch_tokens):
        chosen = select_positions(block.roles, positions)
        total += block.acts[site][chosen.to(block.acts[site].device)].double().sum(0).cpu()
        n_tokens += int(chosen.sum())
    return (total / n_tokens).float()


def _scores(
    lm: LanguageModel,
    sae: SAE,
    site: Site,
    conversations: Sequence[TokenizedConversation],
    positions: Positions,
    mean: Float[Tensor, " d_model"],
    *,
    batch_tokens: int,
) -> Float[Tensor, "conversation d_sae"]:
    """The score of every latent in every conversation."""
    scores = torch.empty(len(conversations), sae.d_sae)
    directions = sae.directions()
    for batch in make_batches(conversations, batch_tokens=batch_tokens):
        acts, grads = residual_gradients(lm, site, batch)
        counted = batch.counted() & select_positions(batch.roles, positions)
        kept = counted.to(acts.device)[..., None]
        dtype = torch.promote_types(acts.dtype, torch.float32)
        grads = torch.where(kept, grads, 0).to(dtype)
        moved = torch.where(kept, acts.to(dtype) - mean.to(acts.device, dtype), 0)
        size = max(1, _CHUNK_ELEMENTS // counted.numel())
        for number, rows in enumerate(torch.split(directions, size)):
            rows = rows.to(acts.device, dtype)
            part = -((grads @ rows.T) * (moved @ rows.T)).sum(1)
            scores[list(batch.rows), number * size : number * size + len(rows)] = part.float().cpu()
    return scores


class _Sums:
    """Running sums over the scores of two classes of conversations, and over those of every bootstrap resample."""

    def __init__(self, n: tuple[int, int], d_sae: int, n_resamples: int, seed: int, *, paired: bool) -> None:
        self.n = n
        self.paired = paired
        first = bootstrap_weights(n[0], n_resamples, seed=seed)
        self.weights = (first, first if paired else bootstrap_weights(n[1], n_resamples, seed=seed + 1))
        self.resampled = torch.zeros(n_resamples, d_sae)
        self.totals, self.squares = torch.zeros(2, 2, d_sae, dtype=torch.double)
        self.products = torch.zeros(d_sae, dtype=torch.double)

    def add(
        self,
        start: int,
        misaligned: Float[Tensor, "n_misaligned d_sae"],
        aligned: Float[Tensor, "n_aligned d_sae"],
    ) -> None:
        for side, (scores, sign) in enumerate(((misaligned, 1), (aligned, -1))):
            weights = self.weights[side][:, start : start + len(scores)]
            self.resampled.addmm_(weights, scores, alpha=sign)
            self.totals[side] += scores.double().sum(0)
            self.squares[side] += scores.double().square().sum(0)
        if self.paired:
            self.products += (misaligned.double() * aligned.double()).sum(0)

    def table(self) -> pl.DataFrame:
        import polars as pl

        n = torch.tensor(self.n, dtype=torch.double)[:, None]
        means = self.totals / n
        variances = (self.squares / n - means.square()).clamp_min(0) / (n - 1)  # of the means
        variance = variances.sum(0)
        if self.paired:
            covariance = (self.products / self.n[0] - means.prod(0)) / (self.n[0] - 1)
            variance = (variance - 2 * covariance).clamp_min(0)
        score = means[0] - means[1]
        ends = torch.tensor([0.025, 0.975])  # some latents at a time: torch.quantile takes 2^24 numbers at most
        parts = [torch.quantile(part, ends, dim=0) for part in torch.split(self.resampled, _QUANTILE_LATENTS, 1)]
        low, high = torch.cat(parts, dim=1).double()
        rank = torch.empty(len(score), dtype=torch.long)
        rank[torch.argsort(-score, stable=True)] = torch.arange(1, len(score) + 1)
        columns = {
            "latent": torch.arange(len(score)),
            "misaligned": means[0],
            "aligned": means[1],
            "score": score,
            "low": low,
            "high": high,
            "se": variance.sqrt(),
            "rank": rank,
            "n_misaligned": torch.full((len(score),), self.n[0]),
            "n_aligned": torch.full((len(score),), self.n[1]),
        }
        return pl.DataFrame({name: values.numpy() for name, values in columns.items()})
