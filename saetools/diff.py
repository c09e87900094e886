"""Which latents a fine-tune changed: the same tokens through base and tuned model, read with one SAE.

For every latent and token role: mean, firing rate and quantiles of activations in both models, the paired change with
a bootstrap interval over conversations, a p-value and a false discovery rate, and a rank (arXiv 2506.19823). Use it on
text that both models read. It does not tell whether a latent causes anything: for that, `evaluate.certify_latents`.
It does not see latents that only the tuned model has: for that, a crosscoder; whether the SAE sees the change at all
stands in `LatentDiff.adequacy`.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saetools.activations.stream import stream_activations
from saetools.adequacy import Adequacy, AdequacySums
from saetools.changes import FDR, change_figures, ranks
from saetools.data.conversation import Conversation
from saetools.data.roles import Positions, select_positions
from saetools.data.template import render
from saetools.data.tokenizing import TokenizedConversation, TokenizeReport, tokenize, tokens_sha256
from saetools.errors import InputError, IntegrityError, SaetoolsWarning
from saetools.latents.paired import pair_readings
from saetools.latents.reading import QUANTILES, LatentReader, RoleReading
from saetools.models.language_model import LanguageModel
from saetools.models.load import check_pair
from saetools.models.site import Site
from saetools.provenance import sha256_of_file, versions, write_json
from saetools.sae.identity import sae_sha256, sae_site
from saetools.sae.model import SAE

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import polars as pl

_TABLE, _CONVERSATIONS, _REST = "latents.parquet", "conversations.parquet", "rest.safetensors"
_FACTS = "diff.json"


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
            model, `p_value` (sign flips, two-sided) and `q_value` (the false discovery rate at which it counts as
            changed), both null for latents with too few of them, `rank` (1 = largest increase), `n_conversations`.
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
        return tuple(f"{role}: {text}" for role, one in self.adequacy.items() for text in one.warnings)

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

    def figure(self, *, n_labels: int = 10) -> go.Figure:
        """Change against effect size at one role, one dot per latent that fires at all, the largest named.

        Raises:
            InputError: if several roles were read.
        """
        import plotly.graph_objects as go
        import polars as pl

        self.check_single_role()
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
        """Write `latents.parquet`, `conversations.parquet`, `rest.safetensors` (what the SAE does not see) and
        `diff.json` (all else) into a folder, the JSON last.
        """
        from safetensors.torch import save_file

        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / _FACTS).unlink(missing_ok=True)
        for name, frame in ((_TABLE, self.table), (_CONVERSATIONS, self.conversations)):
            temporary = path / f".{name}.tmp"
            frame.write_parquet(temporary)
            temporary.replace(path / name)
        save_file({role: one.rest_directions for role, one in self.adequacy.items()}, path / _REST)
        hashes = {name: sha256_of_file(path / name) for name in (_TABLE, _CONVERSATIONS, _REST)}
        facts = {
            "provenance": self.provenance,
            "warnings": self.warnings,
            "adequacy": {role: one.to_json() for role, one in self.adequacy.items()},
            "sha256": hashes,
        }
        write_json(path / _FACTS, facts)
        return path

    @classmethod
    def load(cls, path: str | Path) -> LatentDiff:
        """Read what `save` wrote.

        Raises:
            InputError: if the folder holds no diff.
            IntegrityError: if a file is damaged, or a table is not the one that was saved.
        """
        import polars as pl
        from safetensors.torch import load_file

        path = Path(path)
        if not all((path / name).is_file() for name in (_TABLE, _CONVERSATIONS, _REST, _FACTS)):
            raise InputError(
                "path",
                expected=f"a folder with {_TABLE}, {_CONVERSATIONS}, {_REST} and {_FACTS}",
                received=str(path),
                remedy="save a diff there",
            )
        try:
            facts = json.loads((path / _FACTS).read_text(encoding="utf-8"))
            hashes, provenance = facts["sha256"], facts["provenance"]
            changed = [name for name, expected in hashes.items() if sha256_of_file(path / name) != expected]
            adequacy = {} if changed else _adequacy(facts["adequacy"], load_file(path / _REST))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{path / _FACTS} is damaged ({error!r}); make the diff again") from error
        if changed:
            raise IntegrityError(f"{path / changed[0]} has changed since it was saved; make the diff again")
        return cls(pl.read_parquet(path / _TABLE), pl.read_parquet(path / _CONVERSATIONS), adequacy, provenance)

    def summary(self, n: int) -> dict[str, Any]:
        """The n largest increases of each role, with adequacy, warnings and provenance, as plain values."""
        return {
            "warnings": list(self.warnings),
            "positions": {
                role: {
                    "adequacy": one.to_json(),
                    "n_tested": int(self.at(role).table["q_value"].is_not_null().sum()),
                    "n_changed": int((self.at(role).table["q_value"] <= FDR).sum()),
                    "top": self.at(role).top(n).drop("positions").to_dicts(),
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


def _adequacy(figures: dict[str, Any], rest: Mapping[str, Tensor]) -> dict[Positions, Adequacy]:
    return {role: Adequacy.from_json(one, rest[role]) for role, one in figures.items()}  # type: ignore[misc]


@dataclass(frozen=True)
class DiffConfig:
    """Settings of a diff."""

    max_tokens: int | None = None
    """Longer conversations are cut, and counted in the provenance."""
    min_active: int = 10
    """Latents active in fewer conversations, in either model, are not tested; this does not look at the change."""
    n_resamples: int = 2000
    """Of the bootstrap."""
    seed: int = 0
    """Of the bootstrap and of random decoder rows."""
    batch_tokens: int = 4096
    """Padded tokens of a forward pass."""


def diff_latents(
    base: LanguageModel,
    tuned: LanguageModel,
    sae: SAE,
    conversations: Sequence[Conversation],
    *,
    positions: Positions | Sequence[Positions] = "prompt",
    site: Site | None = None,
    config: DiffConfig = DiffConfig(),
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentDiff:
    """Read the same conversations with both models and compare latent activations.

    The unit of statistics is the conversation: activations are averaged over its tokens, the change is paired. First
    positions (attention sinks) do not count. Memory grows with the active latents of conversations, never with tokens x
    d_sae. A `SaetoolsWarning` says where the SAE is blind to the change.

    Args:
        base: the model before the fine-tune.
        tuned: the model after it; a view of the same weights or another model.
        sae: an SAE of the base model.
        conversations: what both read. Prompts without answers are read with the tokens that open an answer.
        positions: which tokens count: `prompt`, `last_prompt`, `header`, `response`, `template` or `all`; or several,
            from the same passes.
        site: where the SAE reads; by default what its metadata says.
        config: settings.
        on_progress: called with conversations done and in all.

    Raises:
        InputError: for models that cannot be compared or that split the conversations into other tokens, or fewer than
            two conversations with such tokens.
    """
    site = site or sae_site(sae)
    roles: tuple[Positions, ...] = (positions,) if isinstance(positions, str) else tuple(dict.fromkeys(positions))
    check_diff(base, tuned, sae, conversations, config)
    report = TokenizeReport()
    tokenized = tokenize_for(conversations, base, roles, config.max_tokens, report)
    readers = {side: LatentReader(len(tokenized), sae.d_sae, roles) for side in ("base", "tuned")}
    adequacy = AdequacySums(sae, site, len(tokenized), roles, seed=config.seed)
    streams = (stream_activations(lm, [site], tokenized, batch_tokens=config.batch_tokens) for lm in (base, tuned))
    done = 0
    for before, after in zip(*streams, strict=True):
        latents = [sae.encode(block.acts[site].to(sae.W_dec.device)) for block in (before, after)]
        for reader, block, own in zip(readers.values(), (before, after), latents, strict=True):
            reader.add(block, own)
        adequacy.add(before, after, *latents)
        done += len(torch.unique(before.documents))
        if on_progress is not None:
            on_progress(done, len(tokenized))
    provenance = {
        "base": {"name": base.name, "adapter": base.adapter, **base.provenance},
        "tuned": {"name": tuned.name, "adapter": tuned.adapter, **tuned.provenance},
        "sae": sae_sha256(sae),
        "site": str(site),
        "positions": list(roles),
        "n_conversations": len(tokenized),
        "n_truncated": report.n_truncated,
        "data_sha256": tokens_sha256(tokenized, "token_ids"),
        "config": dataclasses.asdict(config),
        "versions": versions(),
    }
    readings = [reader.readings() for reader in readers.values()]
    table, pairs = compare_readings(*readings, config=config)
    figures = adequacy.figures(n_resamples=config.n_resamples, seed=config.seed)
    found = LatentDiff(table, pairs, figures, provenance)
    for text in found.warnings:
        warnings.warn(f"{tuned.name} against {base.name}, {text}", SaetoolsWarning, stacklevel=2)
    return found


def check_diff(
    base: LanguageModel, tuned: LanguageModel, sae: SAE, conversations: Sequence[Conversation], config: DiffConfig
) -> None:
    """Refuse models, SAEs and settings that do not go together.

    Raises:
        InputError: if they do not.
    """
    if sae.d_in != base.d_model:
        raise InputError(
            "sae", expected=f"an SAE of width {base.d_model}", received=sae.d_in, remedy="load an SAE of this model"
        )
    for name in ("n_resamples", "min_active"):
        if getattr(config, name) < 1:
            raise InputError(name, expected="1 or more", received=getattr(config, name), remedy="see the default")
    if base.tokenizer is tuned.tokenizer:
        check_pair(base, tuned, ())
    else:  # both have to split the same texts alike
        texts = [render(one, base.tokenizer) if one.text is None else one.text for one in conversations]
        check_pair(base, tuned, texts)


def tokenize_for(
    conversations: Sequence[Conversation],
    lm: LanguageModel,
    positions: Sequence[Positions],
    max_tokens: int | None,
    report: TokenizeReport,
) -> list[TokenizedConversation]:
    """Tokenise conversations, prompts with the tokens that open an answer, and keep those with tokens at any role.

    Raises:
        InputError: if fewer than two have tokens at one of the roles, first positions aside.
    """
    opens = all(isinstance(one, Conversation) and one.is_prompt for one in conversations)
    tokenized = list(
        tokenize(conversations, lm.tokenizer, max_tokens=max_tokens, add_generation_prompt=opens, report=report)
    )
    kept = [False] * len(tokenized)
    for role in positions:
        have = [bool(select_positions(one.roles[1:], role).any()) for one in tokenized]
        if sum(have) < 2:
            raise InputError(
                "conversations",
                expected=f"two or more with tokens at {role!r}",
                received=f"{sum(have)} of {len(conversations)}",
                remedy="pass more conversations, or other positions",
            )
        kept = [one or own for one, own in zip(kept, have, strict=True)]
    return [one for one, keep in zip(tokenized, kept, strict=True) if keep]


def compare_readings(
    base: Mapping[Positions, RoleReading], tuned: Mapping[Positions, RoleReading], *, config: DiffConfig
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The tables of a `LatentDiff` from what each model's latents did on the same conversations."""
    import polars as pl

    tables, pairs = zip(*(_compare(role, base[role], tuned[role], config) for role in base), strict=True)
    return pl.concat(tables), pl.concat(pairs)


def _compare(
    role: Positions, base: RoleReading, tuned: RoleReading, config: DiffConfig
) -> tuple[pl.DataFrame, pl.DataFrame]:
    import polars as pl

    d_sae, pairs = base.d_sae, pair_readings(base, tuned)
    n, latent = len(pairs.conversations), pairs.latent
    sides = {"base": base, "tuned": tuned}
    deltas = pairs.changes()

    def mean(values: Tensor, latents: Tensor) -> Tensor:
        return torch.zeros(d_sae, dtype=torch.double).index_add_(0, latents, values.double()) / n

    means = {side: mean(one.mean, one.latent) for side, one in sides.items()}
    rates = {side: mean(one.rate, one.latent) for side, one in sides.items()}
    n_active = torch.bincount(latent, minlength=d_sae)
    change = change_figures(
        deltas,
        latent,
        pairs.unit,
        n_active >= config.min_active,
        n_units=n,
        n_resamples=config.n_resamples,
        seed=config.seed,
    )
    columns = {
        "latent": torch.arange(d_sae),
        **{f"mean_{side}": means[side] for side in sides},
        **{f"rate_{side}": rates[side] for side in sides},
        **{f"max_{side}": one.max for side, one in sides.items()},
        **{
            f"p{100 * q:.0f}_{side}": one.quantiles[number]
            for number, q in enumerate(QUANTILES)
            for side, one in sides.items()
        },
        **{name: change[name] for name in ("delta", "low", "high", "se", "effect")},
        "rate_delta": rates["tuned"] - rates["base"],
        "n_active": n_active,
        "p_value": change["p_value"],
        "q_value": change["q_value"],
        "rank": ranks(change["delta"]),
        "n_conversations": torch.full((d_sae,), n),
    }
    table = pl.DataFrame({name: values.numpy() for name, values in columns.items()})
    means_of = pl.DataFrame(
        {
            "conversation": pairs.conversations[pairs.unit].to(torch.int32).numpy(),
            "latent": latent.to(torch.int32).numpy(),
            "base": pairs.base.numpy(),
            "tuned": pairs.tuned.numpy(),
        }
    )
    named = pl.lit(role).alias("positions")
    return table.select(named, pl.all()).with_columns(pl.col("p_value", "q_value").fill_nan(None)), means_of.select(
        named, pl.all()
    )
