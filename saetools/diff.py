"""Which latents a fine-tune changed: the same tokens through base and tuned model, read with one SAE.

For every latent and token role: mean, firing rate and quantiles of activations in both models, the paired change with
a bootstrap interval over conversations, a p-value and a false discovery rate, and a rank (arXiv 2506.19823). Use it on
text that both models read. It does not tell whether a latent causes anything: for that, `evaluate.certify_latents`.
It does not see latents that only the tuned model has: for that, a crosscoder; whether the SAE sees the change at all
stands in `LatentDiff.adequacy`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saetools.activations.stream import stream_activations
from saetools.adequacy import Adequacy, AdequacySums
from saetools.changes import change_figures, change_tests, ranks
from saetools.data.conversation import Conversation
from saetools.data.roles import Positions, select_positions
from saetools.data.template import render
from saetools.data.tokenizing import TokenizedConversation, TokenizeReport, tokenize, tokens_sha256
from saetools.errors import InputError, SaetoolsWarning
from saetools.latent_diff import LatentDiff
from saetools.latents.paired import pair_readings
from saetools.latents.reading import QUANTILES, LatentReader, RoleReading
from saetools.models.language_model import LanguageModel
from saetools.models.load import check_pair
from saetools.models.site import Site
from saetools.provenance import versions
from saetools.sae.identity import sae_sha256, sae_site
from saetools.sae.model import SAE

if TYPE_CHECKING:
    import polars as pl

__all__ = ["DiffConfig", "LatentDiff", "check_diff", "compare_readings", "diff_latents", "read_both", "tokenize_for"]


Readings = dict[Positions, RoleReading]


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
    d_sae. A `SaetoolsWarning` says where the SAE is blind to the change, and where no latent could be tested.

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
    before, after, adequacy = read_both(
        base, tuned, sae, site, tokenized, roles, config=config, on_progress=on_progress
    )
    provenance = {
        "base": base.describe(),
        "tuned": tuned.describe(),
        "sae": sae_sha256(sae),
        "site": str(site),
        "positions": list(roles),
        "n_conversations": len(tokenized),
        "n_truncated": report.n_truncated,
        "data_sha256": tokens_sha256(tokenized, "token_ids"),
        "config": dataclasses.asdict(config),
        "versions": versions(),
    }
    table, pairs = compare_readings(before, after, config=config)
    found = LatentDiff(table, pairs, adequacy, provenance)
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
    """Tokenise conversations, and keep those with tokens at any role.

    Those that end with the user's turn are read with the tokens that open an answer, whatever the others are.

    Raises:
        InputError: if fewer than two have tokens at one of the roles, first positions aside.
    """
    pieces: dict[int, TokenizedConversation] = {}
    for opens in (True, False):
        chosen = [number for number, one in enumerate(conversations) if _is_prompt(one) == opens]
        some = [conversations[number] for number in chosen]
        read = tokenize(some, lm.tokenizer, max_tokens=max_tokens, add_generation_prompt=opens, report=report)
        pieces |= zip(chosen, read, strict=True)
    tokenized = [pieces[number] for number in range(len(conversations))]
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


def _is_prompt(conversation: Conversation) -> bool:
    return isinstance(conversation, Conversation) and conversation.is_prompt  # `tokenize` refuses other types


def read_both(
    base: LanguageModel,
    tuned: LanguageModel,
    sae: SAE,
    site: Site,
    tokenized: Sequence[TokenizedConversation],
    positions: Sequence[Positions],
    *,
    config: DiffConfig,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Readings, Readings, dict[Positions, Adequacy]]:
    """Read the same tokens with both models, side by side: base's latents, tuned's latents, and the SAE's adequacy.

    Args:
        base: the model before the fine-tune.
        tuned: the model after it.
        sae: the SAE.
        site: where it reads.
        tokenized: what both read.
        positions: token roles.
        config: settings.
        on_progress: called with conversations done and in all.
    """
    readers = [LatentReader(len(tokenized), sae.d_sae, positions) for _ in range(2)]
    adequacy = AdequacySums(sae, site, len(tokenized), positions, seed=config.seed)
    streams = (stream_activations(lm, [site], tokenized, batch_tokens=config.batch_tokens) for lm in (base, tuned))
    done = 0
    for blocks in zip(*streams, strict=True):
        latents = [sae.encode(block.acts[site].to(sae.W_dec.device)) for block in blocks]
        for reader, block, own in zip(readers, blocks, latents, strict=True):
            reader.add(block, own)
        adequacy.add(*blocks, *latents)
        done += len(torch.unique(blocks[0].documents))
        if on_progress is not None:
            on_progress(done, len(tokenized))
    before, after = (reader.readings() for reader in readers)
    return before, after, adequacy.figures(n_resamples=config.n_resamples, seed=config.seed)


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
        deltas, latent, pairs.unit, n_measures=d_sae, n_units=n, n_resamples=config.n_resamples, seed=config.seed
    )
    tests = change_tests(deltas, pairs.sizes(), latent, n_active >= config.min_active)
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
        **change,
        "rate_delta": rates["tuned"] - rates["base"],
        "n_active": n_active,
        **tests,
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
    unknown = pl.col("low", "high", "p_value", "q_value").fill_nan(None)
    return table.select(named, pl.all()).with_columns(unknown), means_of.select(named, pl.all())
