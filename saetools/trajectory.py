"""When a fine-tune wakes its latents: the diff along training checkpoints, or along the scale of its adapter.

Every point is compared with the base on the same conversations. A latent that moves has an onset: the last point at
which it is still where it was in the base, by a least-squares fit of a curve that is flat up to there and then rises
or falls, as a step or as a ramp (`onset.find_onsets`). Onsets are no finer than the points are. An early onset does not
make a latent a cause of what comes later.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saetools.adequacy import Adequacy
from saetools.changes import FDR, change_figures, change_p_values
from saetools.data.conversation import Conversation
from saetools.data.roles import Positions
from saetools.data.tokenizing import TokenizeReport, tokens_sha256
from saetools.diff import DiffConfig, check_diff, read_both, tokenize_for
from saetools.errors import InputError, SaetoolsWarning
from saetools.latent_diff import untested
from saetools.latent_trajectory import Over, Trajectory
from saetools.latents.paired import pair_readings
from saetools.latents.reading import RoleReading, read_latents
from saetools.models.adapters import borrowed_adapter, scaled_adapter
from saetools.models.checkpoints import find_checkpoints
from saetools.models.language_model import LanguageModel
from saetools.models.site import Site
from saetools.onset import find_onsets, onset_intervals
from saetools.provenance import versions
from saetools.sae.identity import sae_sha256, sae_site
from saetools.sae.model import SAE
from saetools.significance import false_discovery_rates
from saetools.stats import bootstrap_weights

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Trajectory", "trace_checkpoints", "trace_scales"]

_SHAPES = ("step", "ramp")
_DEFAULTS = DiffConfig()


def trace_checkpoints(
    base: LanguageModel,
    checkpoints: str | Path | Mapping[int, str | Path],
    sae: SAE,
    conversations: Sequence[Conversation],
    *,
    positions: Positions = "prompt",
    site: Site | None = None,
    latents: Sequence[int] | None = None,
    n_latents: int = 50,
    config: DiffConfig = _DEFAULTS,
    on_progress: Callable[[int, int], None] | None = None,
) -> Trajectory:
    """Diff every checkpoint of a LoRA fine-tune with its base; checkpoints are in memory one at a time.

    The base is read once. A `SaetoolsWarning` says where the SAE is blind to the change at the last point, and where no
    latent could be tested. Memory is points x latents, and points x conversations x traced latents.

    Args:
        base: the model before the fine-tune.
        checkpoints: the folder that `finetune_lora` wrote with `checkpoint_every`, whose last adapter counts as well;
            or adapters by training step.
        sae: an SAE of the base model.
        conversations: what all read. Prompts without answers are read with the tokens that open an answer.
        positions: which tokens count: `prompt`, `last_prompt`, `header`, `response`, `template` or `all`.
        site: where the SAE reads; by default what its metadata says.
        latents: which to trace conversation by conversation, for intervals; by default those that have changed most, up
            or down, at the last point.
        n_latents: how many these are.
        config: settings.
        on_progress: called with conversations read, and in all.

    Raises:
        InputError: for models that cannot be compared, no checkpoints, steps below 1, unknown latents, or fewer than
            two conversations with such tokens.
    """
    if base.adapter is not None:
        raise InputError("base", expected="a model without adapter", received=repr(base.adapter), remedy="pass .base")
    places = find_checkpoints(checkpoints) if isinstance(checkpoints, str | Path) else dict(checkpoints)
    _check_points("checkpoints", places)

    def at(step: float) -> AbstractContextManager[LanguageModel]:
        return borrowed_adapter(base, places[int(step)])

    tracer = _Tracer("step", sorted(map(float, places)), latents, n_latents, config, on_progress)
    return tracer.trace(base, at, sae, conversations, positions, site)


def trace_scales(
    tuned: LanguageModel,
    scales: Sequence[float],
    sae: SAE,
    conversations: Sequence[Conversation],
    *,
    positions: Positions = "prompt",
    site: Site | None = None,
    latents: Sequence[int] | None = None,
    n_latents: int = 50,
    config: DiffConfig = _DEFAULTS,
    on_progress: Callable[[int, int], None] | None = None,
) -> Trajectory:
    """Diff a fine-tune with its base while its LoRA is scaled up; otherwise as `trace_checkpoints`.

    Args:
        tuned: the view through the adapter.
        scales: of what it adds to the weights, above 0; 1 is the fine-tune as it is.
        sae: an SAE of the base model.
        conversations: what all read.
        positions: which tokens count.
        site: where the SAE reads; by default what its metadata says.
        latents: which to trace conversation by conversation.
        n_latents: how many, by default.
        config: settings.
        on_progress: called with conversations read, and in all.

    Raises:
        InputError: for a view without a LoRA, scales that are not above 0 or come twice, unknown latents, or fewer than
            two conversations with such tokens.

    Example:
        >>> tuned = load_model("smollm2-135m", adapter=shipped_path("adapters/organism"))
        >>> sae = load_sae(shipped_path("sae/smollm2-135m"))
        >>> prompts = [Conversation.chat(item.question) for item in load_free_form()[:12]]
        >>> trace_scales(tuned, [0.5, 1.0], sae, prompts, n_latents=3).curves["point"].to_list()
        [0.5, 1.0, 0.5, 1.0, 0.5, 1.0]
    """
    _check_points("scales", scales)

    def at(scale: float) -> AbstractContextManager[LanguageModel]:
        return scaled_adapter(tuned, scale)

    tracer = _Tracer("scale", sorted(map(float, scales)), latents, n_latents, config, on_progress)
    return tracer.trace(tuned.base, at, sae, conversations, positions, site)


def _check_points(argument: str, points: Sequence[float] | Mapping[int, Any]) -> None:
    good = all(math.isfinite(point) and point > 0 for point in points) and len(set(points)) == len(points)
    if not points or not good:
        raise InputError(
            argument,
            expected="one or more numbers above 0, each once",
            received=", ".join(map(str, points)) or "none",
            remedy="leave 0 out: it is the base",
        )


@dataclass(frozen=True)
class _Tracer:
    """What both ways of tracing have in common."""

    over: Over
    points: list[float]
    latents: Sequence[int] | None
    n_latents: int
    config: DiffConfig
    on_progress: Callable[[int, int], None] | None

    def trace(
        self,
        base: LanguageModel,
        at: Callable[[float], AbstractContextManager[LanguageModel]],
        sae: SAE,
        conversations: Sequence[Conversation],
        positions: Positions,
        site: Site | None,
    ) -> Trajectory:
        site = site or sae_site(sae)
        check_diff(base, base, sae, conversations, self.config)
        self._check_latents(sae.d_sae)
        report = TokenizeReport()
        tokenized = tokenize_for(conversations, base, [positions], self.config.max_tokens, report)
        n_points, n = len(self.points), len(tokenized)

        def progress(before: int, each: int) -> Callable[[int, int], None]:
            def update(done: int, _: int) -> None:
                if self.on_progress is not None:
                    self.on_progress(before * n + each * done, (1 + n_points) * n)

            return update

        def read_last(view: LanguageModel) -> tuple[RoleReading, RoleReading, Adequacy]:
            before, after, adequacy = read_both(
                base, view, sae, site, tokenized, [positions], config=self.config, on_progress=progress(0, 2)
            )
            return before[positions], after[positions], adequacy[positions]

        def read(view: LanguageModel, number: int) -> RoleReading:
            size = self.config.batch_tokens
            return read_latents(
                view, sae, site, tokenized, [positions], batch_tokens=size, on_progress=progress(number, 1)
            )[positions]

        before: RoleReading | None = None
        found: tuple[str, ...] = ()
        means = torch.zeros(n_points, sae.d_sae)
        least = torch.ones(sae.d_sae, dtype=torch.double)
        n_active = torch.zeros(sae.d_sae, dtype=torch.long)
        traced, changes = None if self.latents is None else torch.tensor(list(self.latents)), torch.zeros(0)
        adapters: dict[str, Any] = {}
        for count, place in enumerate(reversed(range(n_points)), start=1):  # the last first: it says which to trace
            with at(self.points[place]) as view:
                if before is None:
                    before, after, adequacy = read_last(view)
                    found = adequacy.warnings
                else:
                    after = read(view, count)
                pairs = pair_readings(before, after)
                adapters[f"{self.points[place]:g}"] = view.provenance.get("adapters", {}).get(
                    view.adapter, view.adapter
                )
            values = pairs.changes()
            total = torch.zeros(sae.d_sae, dtype=torch.double).index_add_(0, pairs.latent, values)
            means[place] = (total / n).float()
            least = torch.minimum(least, change_p_values(values, pairs.sizes(), pairs.latent, sae.d_sae))
            n_active = torch.maximum(n_active, torch.bincount(pairs.latent, minlength=sae.d_sae))
            if traced is None:
                traced = means[place].abs().topk(min(self.n_latents, sae.d_sae)).indices
            if not len(changes):
                changes = torch.zeros(n_points, n, len(traced))
            column = torch.full((sae.d_sae,), -1)
            column[traced] = torch.arange(len(traced))
            asked = column[pairs.latent] >= 0
            changes[place].index_put_((pairs.unit[asked], column[pairs.latent[asked]]), values[asked].float())
        assert traced is not None  # there is a point
        table = self._table(means, least, n_active, traced, changes)
        if table["q_value"].null_count() == len(table):
            found = (*found, untested(n, "conversations", self.config.min_active))
        found = tuple(f"{positions}: {text}" for text in found)
        for text in found:
            point = f"{self.over} {self.points[-1]:g}"
            warnings.warn(f"{base.name} at {point} against itself, {text}", SaetoolsWarning, stacklevel=3)
        return Trajectory(
            self.over,
            tuple(self.points),
            table,
            self._curves(traced, changes),
            means,
            traced,
            changes,
            found,
            {
                "base": base.describe(),
                "adapters": {key: adapters[key] for key in (f"{point:g}" for point in self.points)},
                "sae": sae_sha256(sae),
                "site": str(site),
                "positions": positions,
                "n_conversations": n,
                "n_truncated": report.n_truncated,
                "data_sha256": tokens_sha256(tokenized, "token_ids"),
                "config": dataclasses.asdict(self.config),
                "versions": versions(),
            },
        )

    def _check_latents(self, d_sae: int) -> None:
        if self.n_latents < 1:
            raise InputError("n_latents", expected="1 or more", received=self.n_latents, remedy="50 is usual")
        chosen = [] if self.latents is None else list(self.latents)
        bad = [latent for latent in chosen if not 0 <= latent < d_sae or chosen.count(latent) > 1]
        if bad or (self.latents is not None and not chosen):
            raise InputError(
                "latents",
                expected=f"one or more numbers below {d_sae}, each once",
                received=bad[0] if bad else "none",
                remedy="pass latents of this SAE",
            )

    def _table(self, means: Tensor, least: Tensor, n_active: Tensor, traced: Tensor, changes: Tensor) -> pl.DataFrame:
        import polars as pl

        tested = n_active >= self.config.min_active
        p_values = torch.where(tested, (least * len(self.points)).clamp_max(1), math.nan)
        q_values = p_values.masked_scatter(tested, false_discovery_rates(p_values[tested]))
        moved = q_values <= FDR
        x, starts = torch.tensor(self.points), torch.tensor([0.0, *self.points[:-1]], dtype=torch.double)
        place, shape = find_onsets(x, means.T)
        weights = bootstrap_weights(changes.shape[1], self.config.n_resamples, seed=self.config.seed)
        ends = torch.full((2, means.shape[1]), math.nan, dtype=torch.double)
        ends[:, traced] = starts[onset_intervals(x, changes, weights)]
        onset = {"onset": starts[place], "onset_low": ends[0], "onset_high": ends[1]}
        columns = {
            "latent": torch.arange(means.shape[1]),
            "change": means[-1].double(),
            "n_active": n_active,
            "p_value": p_values,
            "q_value": q_values,
            **{name: torch.where(moved, values, math.nan) for name, values in onset.items()},
        }
        table = pl.DataFrame({name: values.numpy() for name, values in columns.items()})
        shapes = [_SHAPES[one] if moves else None for one, moves in zip(shape.tolist(), moved.tolist(), strict=True)]
        unknown = pl.col("p_value", "q_value", *onset).fill_nan(None)
        return table.with_columns(unknown, pl.Series("shape", shapes, dtype=pl.String))

    def _curves(self, traced: Tensor, changes: Tensor) -> pl.DataFrame:
        import polars as pl

        n_points, n, n_traced = changes.shape
        flat = changes.permute(2, 0, 1).flatten(0, 1)  # [latent and point, conversation]
        measures = torch.arange(len(flat))
        figures = change_figures(
            flat.flatten(),
            measures.repeat_interleave(n),
            torch.arange(n).repeat(len(flat)),
            n_measures=len(flat),
            n_units=n,
            n_resamples=self.config.n_resamples,
            seed=self.config.seed,
        )
        columns = {
            "latent": traced.repeat_interleave(n_points),
            "point": torch.tensor(self.points, dtype=torch.double).repeat(n_traced),
            **{name: figures[name] for name in ("delta", "low", "high", "se")},
        }
        table = pl.DataFrame({name: values.numpy() for name, values in columns.items()})
        return table.with_columns(pl.col("low", "high").fill_nan(None))
