"""What an SAE keeps of a model: its activations, and the model's predictions with the reconstruction in their place.

Every figure belongs to positions: how well the residual there is reconstructed, and what the model then predicts next.
Figures of a token role are over the positions of that role, while the reconstruction stands at all of them. Each is a
ratio of sums over tokens, with an interval from resampling whole conversations. On the same tokens they equal those of
SAELens' `run_evals`. Fidelity tells nothing about what latents mean or cause: for that see `saetools.steer`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.activations.stream import ActivationBlock, stream_activations
from saetools.data.conversation import Conversation
from saetools.data.roles import POSITIONS, Positions, select_positions
from saetools.data.tokenizing import TokenizeReport, make_batches, tokenize
from saetools.errors import InputError
from saetools.evaluate.predictions import compare_predictions, fill, splice
from saetools.evaluate.role_fidelity import DENSE_RATE, FREQUENCY_EDGES, RoleFidelity, RoleSums
from saetools.models.forward import read
from saetools.models.language_model import LanguageModel
from saetools.models.replay import LayerReplay
from saetools.models.site import Site
from saetools.provenance import sha256_of_texts, versions
from saetools.sae.identity import sae_sha256, sae_site
from saetools.sae.model import SAE
from saetools.saved_result import save_result
from saetools.stats import Estimate

if TYPE_CHECKING:
    import polars as pl

_NAME = "fidelity"


@dataclass(frozen=True)
class Fidelity:
    """Fidelity of an SAE on a model.

    Args:
        by_role: figures at the positions of each role that occurs; the last is `all`.
        n_truncated: conversations that were cut.
        provenance: model, SAE, site, data, settings, versions.
    """

    by_role: Mapping[Positions, RoleFidelity]
    n_truncated: int
    provenance: Mapping[str, Any]

    @property
    def all(self) -> RoleFidelity:
        """Figures over the positions of all roles."""
        return self.by_role["all"]

    def table(self) -> pl.DataFrame:
        """One row a role: `role`, every figure, and with `_low` and `_high` the ends of its interval; no histogram.

        What is undefined, such as the interval from a single conversation, is null.
        """
        import polars as pl

        return pl.DataFrame([{"role": role, **_row(figures)} for role, figures in self.by_role.items()])

    def save(self, path: str | Path) -> Path:
        """Write `fidelity.parquet` (the table) and `fidelity.json` (with histograms and provenance) into a folder."""
        facts = {
            "roles": {role: {**_row(one), "histogram": one.histogram} for role, one in self.by_role.items()},
            "frequency_edges": FREQUENCY_EDGES,
            "dense_rate": DENSE_RATE,
            "n_truncated": self.n_truncated,
            "provenance": self.provenance,
        }
        return save_result(path, _NAME, {_NAME: self.table()}, facts)


def _row(figures: RoleFidelity) -> dict[str, float | int | None]:
    row: dict[str, float | int | None] = {}
    for field in dataclasses.fields(figures):
        value = getattr(figures, field.name)
        if isinstance(value, Estimate):
            ends = {field.name: value.mean, f"{field.name}_low": value.low, f"{field.name}_high": value.high}
            row |= {name: end if math.isfinite(end) else None for name, end in ends.items()}
        elif field.name != "histogram":
            row[field.name] = value
    return row


@torch.inference_mode()
def measure_fidelity(
    lm: LanguageModel,
    sae: SAE,
    conversations: Sequence[Conversation],
    *,
    site: Site | None = None,
    max_tokens: int | None = 256,
    skip_first: bool = True,
    n_resamples: int = 1000,
    seed: int = 0,
    batch_tokens: int = 2048,
    on_progress: Callable[[int, int], None] | None = None,
) -> Fidelity:
    """Measure an SAE on conversations or texts, by token role.

    They are read twice, first for the mean activations. Beyond one batch, memory grows with conversations alone: at
    1000 resamples by 20 kB each, whatever their length and d_sae.

    Args:
        lm: the model, base or tuned.
        sae: an autoencoder.
        conversations: what to read.
        site: where the SAE reads; by default what its metadata says.
        max_tokens: longer conversations are cut, and counted.
        skip_first: neither count nor replace first positions, which are attention sinks.
        n_resamples: bootstrap resamples.
        seed: of the bootstrap.
        batch_tokens: padded tokens of a forward pass.
        on_progress: called with batches done and in all, over both readings.

    Raises:
        InputError: if there is nothing to predict, no site is known, or for a transcoder or an SAE of another width.
        NonFiniteError: if an activation is NaN or infinite.

    Example:
        >>> sae = load_sae("data/sae/smollm2-135m")
        >>> chats = [Conversation.chat("Name a colour.", "Blue."), Conversation.chat("And a fruit?", "A pear.")]
        >>> fidelity = measure_fidelity(lm, sae, chats)
        >>> list(fidelity.by_role)
        ['prompt', 'last_prompt', 'header', 'response', 'template', 'all']
        >>> 0 < fidelity.by_role["response"].fvu.mean < 0.5
        True
    """
    site = site or sae_site(sae)
    if sae.d_out != sae.d_in or sae.d_in != lm.d_model or sae.metadata.site_out:
        raise InputError(
            "sae",
            expected=f"an autoencoder of width {lm.d_model}, that of {lm.name}",
            received=f"d_in {sae.d_in}, d_out {sae.d_out}",
            remedy="load the SAE of this model",
        )
    report = TokenizeReport()
    tokenized = list(tokenize(conversations, lm.tokenizer, max_tokens=max_tokens, report=report))
    tokenized = [one for one in tokenized if len(one) > skip_first]  # those with a position that counts
    if not any(len(one) > 1 + skip_first for one in tokenized):
        raise InputError("conversations", expected="tokens to predict", received="none", remedy="pass longer texts")
    batches = list(make_batches(tokenized, batch_tokens=batch_tokens))
    tick = ticker(on_progress, 2 * len(batches))
    with lm.active():
        blocks = stream_activations(lm, [site], tokenized, batch_tokens=batch_tokens, skip_first=skip_first)
        means = _role_means(blocks, site, sae.d_in, tick)
        edits = {
            "sae": {site: splice(sae, skip_first=skip_first)},
            "mean": {site: fill(means[POSITIONS.index("all")], skip_first=skip_first)},
            "zero": {site: fill(torch.zeros(sae.d_in), skip_first=skip_first)},
        }
        sums = RoleSums(means, len(tokenized), sae.d_sae)
        for batch in batches:
            counted, replay = batch.counted(skip_first=skip_first), LayerReplay(lm, site)
            with replay.over(lm, batch.token_ids, batch.mask):
                acts = read(lm, batch.token_ids.to(lm.device), batch.mask.to(lm.device), [site])[site]
            predicted = compare_predictions(lm, batch, counted, edits, replay)
            rows = torch.tensor(batch.rows)[:, None].expand_as(counted)
            sums.add(sae, acts[counted.to(acts.device)], batch.roles[counted], rows[counted], predicted)
            tick()
    provenance = {
        "model": lm.describe(),
        "sae": sae_sha256(sae),
        "site": str(site),
        "data_sha256": sha256_of_texts(" ".join(map(str, one.token_ids.tolist())) for one in tokenized),
        "max_tokens": max_tokens,
        "skip_first": skip_first,
        "n_resamples": n_resamples,
        "seed": seed,
        "versions": versions(),
    }
    return Fidelity(dict(sums.figures(n_resamples, seed)), report.n_truncated, provenance)


def ticker(on_progress: Callable[[int, int], None] | None, n: int) -> Callable[[], None]:
    """What to call `n` times, once something is done each time."""
    numbers = itertools.count(1)

    def tick() -> None:
        number = next(numbers)
        if on_progress is not None:
            on_progress(number, n)

    return tick


def _role_means(
    blocks: Iterable[ActivationBlock], site: Site, d_in: int, tick: Callable[[], None]
) -> Float[Tensor, "role d_in"]:
    """Mean activation of each role, in the order of `POSITIONS`, in float64; 0 for one that does not occur."""
    sums = torch.zeros(len(POSITIONS), d_in, dtype=torch.double)
    counts = torch.zeros(len(POSITIONS), 1, dtype=torch.double)
    for block in blocks:
        x = block.acts[site].double()
        for index, role in enumerate(POSITIONS):
            chosen = select_positions(block.roles, role)
            sums[index] += x[chosen.to(x.device)].sum(0).cpu()
            counts[index] += chosen.sum()
        tick()
    return sums / counts.clamp_min(1)
