"""Which latents a fine-tune changed: the same tokens through base and tuned model, read with one SAE.

For every latent: mean activation and firing rate in both models, the paired change with a bootstrap interval over
conversations, and a rank (arXiv 2506.19823). Use it on text that both models read. It does not tell whether a latent
causes anything: for that, steer. It does not see latents that only the tuned model has: for that, a crosscoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.activations.stream import stream_activations
from saetools.data.conversation import Conversation
from saetools.data.roles import Positions, select_positions
from saetools.data.template import render
from saetools.data.tokenizing import TokenizedConversation, TokenizeReport, tokenize
from saetools.errors import InputError, IntegrityError
from saetools.models.language_model import LanguageModel
from saetools.models.load import check_pair
from saetools.models.site import Site
from saetools.provenance import sha256_of_file, sha256_of_texts, versions, write_json
from saetools.sae.model import SAE
from saetools.sae.sparse import SparseLatents
from saetools.stats import bootstrap_weights

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import polars as pl

_TABLE, _FACTS = "latents.parquet", "diff.json"


@dataclass(frozen=True)
class LatentDiff:
    """Base against tuned, latent by latent.

    Args:
        table: one row per latent, by `latent`: `mean_base`, `mean_tuned` (activation, averaged over the tokens of a
            conversation and then over conversations), `rate_base`, `rate_tuned` (share of tokens on which it is active,
            averaged alike), `delta` = mean_tuned - mean_base with its 95 % interval `low`, `high` and standard error
            `se`, `effect` = delta / sd over conversations (0 if the sd is), `rank` (1 = largest increase),
            `n_conversations`.
        provenance: models, SAE, data, positions, seed, versions.
    """

    table: pl.DataFrame
    provenance: dict[str, Any]

    def top(self, n: int, *, decreases: bool = False) -> pl.DataFrame:
        """The n largest increases, or decreases, of mean activation; largest first.

        Raises:
            InputError: if n is not positive.
        """
        if n < 1:
            raise InputError("n", expected="1 or more", received=n, remedy="ask for at least one latent")
        return self.table.sort("delta", descending=not decreases, maintain_order=True).head(n)

    def figure(self, *, n_labels: int = 10) -> go.Figure:
        """Change against effect size, one dot per latent that fires at all, the largest named."""
        import plotly.graph_objects as go
        import polars as pl

        table = self.table.filter((pl.col("rate_base") > 0) | (pl.col("rate_tuned") > 0))
        named = set(self.top(n_labels)["latent"]) | set(self.top(n_labels // 2, decreases=True)["latent"])
        hover = [
            f"latent {row['latent']}<br>delta {row['delta']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            f"<br>active on {row['rate_base']:.1%} -> {row['rate_tuned']:.1%} of tokens"
            for row in table.iter_rows(named=True)
        ]
        figure = go.Figure(
            go.Scattergl(
                x=table["delta"],
                y=table["effect"],
                mode="markers+text",
                text=[str(latent) if latent in named else "" for latent in table["latent"]],
                textposition="top center",
                hovertext=hover,
                hoverinfo="text",
                marker={"size": 6, "opacity": 0.6},
            )
        )
        figure.update_layout(
            xaxis_title="change of mean activation, tuned - base",
            yaxis_title="effect size (change / sd over conversations)",
            template="plotly_white",
            margin={"l": 60, "r": 20, "t": 20, "b": 50},
        )
        return figure

    def save(self, path: str | Path) -> Path:
        """Write `latents.parquet` and `diff.json` (provenance) into a folder; the JSON is written last."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / _FACTS).unlink(missing_ok=True)
        temporary = path / f".{_TABLE}.tmp"
        self.table.write_parquet(temporary)
        temporary.replace(path / _TABLE)
        write_json(path / _FACTS, {"provenance": self.provenance, "table_sha256": sha256_of_file(path / _TABLE)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> LatentDiff:
        """Read what `save` wrote.

        Raises:
            InputError: if the folder holds no diff.
            IntegrityError: if a file is damaged, or the table is not the one that was saved.
        """
        import polars as pl

        path = Path(path)
        if not (path / _FACTS).is_file() or not (path / _TABLE).is_file():
            raise InputError(
                "path", expected=f"a folder with {_TABLE} and {_FACTS}", received=str(path), remedy="save a diff there"
            )
        try:
            facts = json.loads((path / _FACTS).read_text(encoding="utf-8"))
            expected, provenance = facts["table_sha256"], facts["provenance"]
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path / _FACTS} is damaged ({error!r}); make the diff again") from error
        if sha256_of_file(path / _TABLE) != expected:
            raise IntegrityError(f"{path / _TABLE} has changed since it was saved; make the diff again")
        return cls(pl.read_parquet(path / _TABLE), provenance)


def diff_latents(
    base: LanguageModel,
    tuned: LanguageModel,
    sae: SAE,
    conversations: Sequence[Conversation],
    *,
    positions: Positions,
    site: Site | None = None,
    max_tokens: int | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
    batch_tokens: int = 4096,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentDiff:
    """Read the same conversations with both models and compare latent activations.

    The unit of statistics is the conversation: activations are averaged over its tokens, the change is paired. First
    positions (attention sinks) do not count. Memory is d_sae x resamples, whatever the number of tokens.

    Args:
        base: the model before the fine-tune.
        tuned: the model after it; a view of the same weights or another model.
        sae: an SAE of the base model.
        conversations: what both read.
        positions: which tokens count: `prompt`, `last_prompt`, `header`, `response`, `template` or `all`. For `header`
            and `last_prompt` prompts without answers are read with the tokens that open an answer.
        site: where the SAE reads; by default what its metadata says.
        max_tokens: longer conversations are cut (and counted in the provenance).
        n_resamples: bootstrap resamples.
        seed: of the bootstrap.
        batch_tokens: padded tokens of a forward pass.
        on_progress: called with conversations done and in all.

    Raises:
        InputError: for models that cannot be compared or that split the conversations into other tokens, or fewer than
            two conversations with such tokens.
    """
    site = site or sae_site(sae)
    if sae.d_in != base.d_model:
        raise InputError(
            "sae", expected=f"an SAE of width {base.d_model}", received=sae.d_in, remedy="load an SAE of this model"
        )
    if n_resamples < 1:
        raise InputError("n_resamples", expected="1 or more", received=n_resamples, remedy="1000 is usual")
    report = TokenizeReport()
    # What opens an answer is there only if an answer follows, or is asked for.
    opens = positions in ("header", "last_prompt") and all(one.is_prompt for one in conversations)
    tokenized = list(
        tokenize(conversations, base.tokenizer, max_tokens=max_tokens, add_generation_prompt=opens, report=report)
    )
    check_pair(base, tuned, () if base.tokenizer is tuned.tokenizer else _texts(base, conversations))
    tokenized = [one for one in tokenized if bool(select_positions(one.roles[1:], positions).any())]
    if len(tokenized) < 2:
        raise InputError(
            "conversations",
            expected=f"two or more with tokens at {positions!r}",
            received=f"{len(tokenized)} of {len(conversations)}",
            remedy="pass more conversations, or other positions",
        )
    sums = _Sums(len(tokenized), sae.d_sae, n_resamples, seed)
    for start in range(0, len(tokenized), _BLOCK):
        block = tokenized[start : start + _BLOCK]
        before, after = (
            _conversation_means(lm, sae, site, block, positions, batch_tokens=batch_tokens) for lm in (base, tuned)
        )
        sums.add(start, before, after)
        if on_progress is not None:
            on_progress(start + len(block), len(tokenized))
    provenance = {
        "base": {"name": base.name, "adapter": base.adapter, **base.provenance},
        "tuned": {"name": tuned.name, "adapter": tuned.adapter, **tuned.provenance},
        "sae": sae_sha256(sae),
        "site": str(site),
        "positions": positions,
        "n_conversations": len(tokenized),
        "n_truncated": report.n_truncated,
        "data_sha256": sha256_of_texts(" ".join(map(str, one.token_ids.tolist())) for one in tokenized),
        "n_resamples": n_resamples,
        "seed": seed,
        "versions": versions(),
    }
    return LatentDiff(sums.table(), provenance)


def _texts(base: LanguageModel, conversations: Sequence[Conversation]) -> list[str]:
    """What both tokenizers have to split alike."""
    return [render(one, base.tokenizer) if one.text is None else one.text for one in conversations]


def sae_site(sae: SAE) -> Site:
    """The site an SAE was trained on, by its metadata.

    Raises:
        InputError: if the metadata does not say.
    """
    if not sae.metadata.site:
        raise InputError(
            "site", expected="a site", received="none, and the SAE does not name its own", remedy="pass site="
        )
    return Site.parse(sae.metadata.site)


def sae_sha256(sae: SAE) -> str:
    """SHA-256 over the weights of an SAE in memory, in hexadecimal."""
    digest = hashlib.sha256()
    for weight in sae.parameters():
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_QUANTILE_LATENTS = 1024
_BLOCK = 64  # conversations whose means over tokens exist at the same time, [block, d_sae]


@dataclass(frozen=True)
class _Means:
    acts: Float[Tensor, "conversation d_sae"]
    rates: Float[Tensor, "conversation d_sae"]


def _conversation_means(
    lm: LanguageModel,
    sae: SAE,
    site: Site,
    conversations: Sequence[TokenizedConversation],
    positions: Positions,
    *,
    batch_tokens: int,
) -> _Means:
    """Mean activation and firing rate of every latent in every conversation, over its tokens at some positions."""
    acts = torch.zeros(len(conversations), sae.d_sae)
    rates = torch.zeros(len(conversations), sae.d_sae)
    counts = torch.zeros(len(conversations))
    for block in stream_activations(lm, [site], conversations, batch_tokens=batch_tokens):
        chosen = select_positions(block.roles, positions)
        latents = sae.encode(block.acts[site][chosen.to(block.acts[site].device)].to(sae.W_dec.device))
        rows = block.documents[chosen]
        _add_sums(acts, latents, rows, latents.values)
        _add_sums(rates, latents, rows, (latents.values != 0).float())
        counts.index_add_(0, rows, torch.ones(len(rows)))
    return _Means(acts / counts[:, None], rates / counts[:, None])


def _add_sums(
    totals: Float[Tensor, "conversation d_sae"],
    latents: SparseLatents,
    rows: Int[Tensor, " token"],
    values: Float[Tensor, "token slot"],
) -> None:
    cells = rows[:, None] * totals.shape[1] + latents.indices.cpu()
    totals.view(-1).index_add_(0, cells.flatten(), values.float().cpu().flatten())


class _Sums:
    """Running sums over conversations, and over those of every bootstrap resample."""

    def __init__(self, n: int, d_sae: int, n_resamples: int, seed: int) -> None:
        self.n = n
        self.weights = bootstrap_weights(n, n_resamples, seed=seed)
        self.resampled = torch.zeros(n_resamples, d_sae)
        self.totals = {
            name: torch.zeros(d_sae, dtype=torch.double)
            for name in ("mean_base", "mean_tuned", "rate_base", "rate_tuned", "delta_squared")
        }

    def add(self, start: int, base: _Means, tuned: _Means) -> None:
        delta = tuned.acts - base.acts
        self.resampled.addmm_(self.weights[:, start : start + len(delta)], delta)
        for name, values in (
            ("mean_base", base.acts),
            ("mean_tuned", tuned.acts),
            ("rate_base", base.rates),
            ("rate_tuned", tuned.rates),
            ("delta_squared", delta.double().square()),
        ):
            self.totals[name] += values.double().sum(0)

    def table(self) -> pl.DataFrame:
        import polars as pl

        means = {name: total / self.n for name, total in self.totals.items()}
        delta = means["mean_tuned"] - means["mean_base"]
        variance = (means["delta_squared"] - delta.square()).clamp_min(0) * (self.n / (self.n - 1))
        sd = variance.sqrt()
        effect = torch.where(sd > 0, delta / sd, 0.0)
        ends = torch.tensor([0.025, 0.975])  # some latents at a time: torch.quantile takes 2^24 numbers at most
        parts = [torch.quantile(part, ends, dim=0) for part in torch.split(self.resampled, _QUANTILE_LATENTS, 1)]
        low, high = torch.cat(parts, dim=1).double()
        rank = torch.empty(len(delta), dtype=torch.long)
        rank[torch.argsort(-delta, stable=True)] = torch.arange(1, len(delta) + 1)
        columns = {
            "latent": torch.arange(len(delta)),
            "mean_base": means["mean_base"],
            "mean_tuned": means["mean_tuned"],
            "rate_base": means["rate_base"],
            "rate_tuned": means["rate_tuned"],
            "delta": delta,
            "low": low,
            "high": high,
            "se": sd / self.n**0.5,
            "effect": effect,
            "rank": rank,
            "n_conversations": torch.full((len(delta),), self.n),
        }
        return pl.DataFrame({name: values.numpy() for name, values in columns.items()})
