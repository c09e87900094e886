"""The stages of a search for the persona: each saves its result, or reads the one that is there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch

from saetools.attribution import attribute_latents
from saetools.changes import FDR
from saetools.consensus import Consensus, find_consensus
from saetools.data.conversation import Conversation, Message
from saetools.data.roles import Positions
from saetools.data.shipped import ForcedChoiceItem
from saetools.diff import DiffConfig, LatentDiff, diff_latents
from saetools.directions import mean_difference
from saetools.errors import InputError
from saetools.evaluate.causal import certify_latents
from saetools.evaluate.certificate import Candidate, Certification
from saetools.evaluate.certificate_config import CertificateConfig
from saetools.evaluate.coherence import Judge
from saetools.evaluate.forced_choice import score_forced_choice
from saetools.generation import SamplingConfig, generate
from saetools.interpret.promoted import promoted_tokens
from saetools.models.checkpoints import find_checkpoints
from saetools.models.language_model import LanguageModel
from saetools.models.site import Site
from saetools.provenance import differing, sha256_of_texts, versions, write_json
from saetools.rankings import Rankings, compare_rankings
from saetools.readings import ChangeSplit, split_change
from saetools.sae.identity import sae_sha256
from saetools.sae.model import SAE
from saetools.trajectory import Trajectory, trace_checkpoints

if TYPE_CHECKING:
    import polars as pl

_RUN = "run.json"


@dataclass(frozen=True)
class PersonaConfig:
    """Settings of a search for the persona."""

    positions: tuple[Positions, ...] = ("prompt", "response")
    """Roles that are diffed, over the base's own answers."""
    role: Positions = "response"
    """The one whose changes rank latents: by default the answers, where behaviour shows and certificates are scored.
    arXiv 2506.19823 ranks at prompts, which are diffed beside."""
    n_candidates: int = 10
    """Latents that are certified, one by one and together: of those that rose in all selection organisms, the first by
    increase and the first by attribution, in turn."""
    n_listed: int = 50
    """Latents in the result."""
    n_overlap: int = 100
    """How many of the first latents of each ranking are compared."""
    n_answer_tokens: int = 48
    """Length of the models' own answers, which are the likeliest ones."""
    n_resamples: int = 2000
    """Of every bootstrap."""
    certificate: CertificateConfig = field(default_factory=CertificateConfig)
    """Settings of the certificates; its seed is that of all else as well."""

    @property
    def seed(self) -> int:
        """Of everything that is left to chance."""
        return self.certificate.seed


@runtime_checkable
class _Saved(Protocol):
    def save(self, path: str | Path) -> Path: ...


_Result = TypeVar("_Result", bound=_Saved)


class Stages:
    """What all stages work on; each saves its result, or reads the one that is there."""

    def __init__(
        self,
        base: LanguageModel,
        organisms: Mapping[str, LanguageModel],
        sae: SAE,
        prompts: Sequence[Conversation],
        items: Sequence[ForcedChoiceItem],
        texts: Sequence[str],
        out: Path,
        held_out: Collection[str],
        site: Site,
        config: PersonaConfig,
    ) -> None:
        self._base, self._organisms, self._sae, self._site = base, organisms, sae, site
        self._prompts, self._texts, self._out, self._held_out, self._config = prompts, texts, out, held_out, config
        self._ranked, self._scored = _halves(items)
        self._diffing = DiffConfig(n_resamples=config.n_resamples, seed=config.seed)
        questions = ["\n".join(message.content for message in one.messages) for one in prompts]
        self.identity = {
            "base": {"name": base.name, **base.provenance},
            "organisms": {name: {"adapter": lm.adapter, **lm.provenance} for name, lm in organisms.items()},
            "held_out": sorted(held_out),
            "sae": sae_sha256(sae),
            "site": str(site),
            "prompts_sha256": sha256_of_texts(questions),
            "items_sha256": sha256_of_texts(f"{one.question}\n{one.aligned}\n{one.misaligned}" for one in items),
            "n_items": {"ranking": len(self._ranked), "behaviour": len(self._scored)},
            "texts_sha256": sha256_of_texts(texts),
            "versions": versions(),
        }

    def check(self, checkpoints: Mapping[str, str | Path]) -> None:
        """Refuse what does not go together, and a folder of another run."""
        selection = [name for name in self._organisms if name not in self._held_out]
        unknown = sorted({*self._held_out, *checkpoints} - set(self._organisms))
        if len(selection) < 2 or unknown:
            raise InputError(
                "organisms",
                expected="two or more to select latents on, and all that are held out or have checkpoints",
                received=f"{', '.join(selection) or 'none'} to select on" + (f", no {unknown[0]}" if unknown else ""),
                remedy="pass more, or hold fewer out",
            )
        if len(self._scored) < 4:  # the smaller half: single ones of a category rank
            raise InputError(
                "items",
                expected="two or more of four categories, or more of fewer: half of each rank, half are scored",
                received=f"{len(self._ranked)} that rank, {len(self._scored)} that are scored",
                remedy="pass more",
            )
        if self._config.role not in self._config.positions:
            raise InputError(
                "role",
                expected="one of " + ", ".join(self._config.positions),
                received=repr(self._config.role),
                remedy="diff it too",
            )
        for folder in checkpoints.values():
            find_checkpoints(folder)
        unbounded = dataclasses.replace(self._config.certificate, max_minutes=None, max_tokens=None)
        settings = dataclasses.replace(self._config, certificate=unbounded)  # a run may go on with another budget
        ours = json.loads(json.dumps(self.identity | {"settings": dataclasses.asdict(settings)}))
        path = self._out / _RUN
        if not path.is_file():
            self._out.mkdir(parents=True, exist_ok=True)
            write_json(path, ours)
            return
        if changed := differing(ours, json.loads(path.read_text(encoding="utf-8"))):
            raise InputError(
                "out",
                expected="a new folder, or that of the same run",
                received="that of a run with other " + ", ".join(changed),
                remedy="choose another folder",
            )

    def scores(self) -> dict[str, dict[str, Any]]:
        """Behaviour of the base and of every organism."""
        path = self._out / "behaviour.json"
        if not path.is_file():
            base = score_forced_choice(self._base, self._scored)
            found = {"base": {"score": dataclasses.asdict(base.mean)}}
            for name, lm in self._organisms.items():
                own = score_forced_choice(lm, self._scored)
                moved = dataclasses.replace(own, gaps=own.gaps - base.gaps).by_category()
                found[name] = {
                    "score": dataclasses.asdict(own.mean),
                    "shift": dataclasses.asdict(own.minus(base)),
                    "by_category": {category: dataclasses.asdict(shift) for category, shift in moved.items()},
                }
            write_json(path, found)
        scores: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return scores

    def base_answers(self) -> list[Conversation]:
        """What all models read: the prompts with the base's own answers."""
        path = self._out / "answers.json"
        if not path.is_file():
            sampling = SamplingConfig(self._config.n_answer_tokens, temperature=0.0)
            answers = generate(self._base, self._prompts, config=sampling)
            write_json(path, {"answers": [answer.text for answer in answers]})
        texts = json.loads(path.read_text(encoding="utf-8"))["answers"]
        return [
            dataclasses.replace(prompt, messages=(*prompt.messages, Message("assistant", text)))
            for prompt, text in zip(self._prompts, texts, strict=True)
            if text.strip()
        ]

    def diff(self, name: str, read: Sequence[Conversation]) -> LatentDiff:
        """An organism against the base."""
        return self._kept(
            f"diff-{name}",
            LatentDiff.load,
            lambda: diff_latents(
                self._base,
                self._organisms[name],
                self._sae,
                read,
                positions=self._config.positions,
                site=self._site,
                config=self._diffing,
            ),
        )

    def consensus(self, diffs: Mapping[str, LatentDiff]) -> Consensus:
        """What the organisms agree on."""
        own = {name: diff.at(self._config.role) for name, diff in diffs.items()}
        n_resamples, seed = self._config.n_resamples, self._config.seed
        return self._kept(
            "consensus",
            Consensus.load,
            lambda: find_consensus(own, held_out=self._held_out, n_resamples=n_resamples, seed=seed),
        )

    def rankings(self, name: str, diff: LatentDiff) -> Rankings:
        """The diff's order of latents beside those of attribution and of the misalignment direction."""

        def rank() -> Rankings:
            bad, good = (
                [Conversation.chat(item.question, getattr(item, side), id=item.id) for item in self._ranked]
                for side in ("misaligned", "aligned")
            )
            lm, own, seed = self._organisms[name], diff.at(self._config.role), self._config.seed
            attribution = attribute_latents(lm, self._sae, bad, good, site=self._site, paired=True, seed=seed)
            attribution.save(self._out / f"attribution-{name}")
            direction = mean_difference(lm, self._site, bad, good)
            return compare_rankings(own, attribution=attribution, direction=direction, sae=self._sae)

        return self._kept(f"rankings-{name}", Rankings.load, rank)

    def split(self, name: str) -> ChangeSplit:
        """How much of an organism's change is representation."""
        sampling = SamplingConfig(self._config.n_answer_tokens, temperature=0.0)
        return self._kept(
            f"split-{name}",
            ChangeSplit.load,
            lambda: split_change(
                self._base,
                self._organisms[name],
                self._sae,
                self._prompts,
                positions=self._config.role,
                site=self._site,
                sampling=sampling,
                config=self._diffing,
            ),
        )

    def candidates(self, consensus: Consensus, rankings: Mapping[str, Rankings]) -> dict[int, str]:
        """Latents that rose in all selection organisms, and which ranking chose them; maybe none.

        Increase and attribution choose in turn: what rose most is often style, and attribution finds what answers hang
        on, but not what the fine-tune did.
        """
        import polars as pl

        core: list[int] = consensus.core().filter(pl.col("delta") > 0)["latent"].to_list()
        scores = torch.stack([one.table["attribution"].to_torch() for one in rankings.values()]).mean(0)
        orders = {"delta": iter(core), "attribution": iter(sorted(core, key=lambda latent: -float(scores[latent])))}
        chosen: dict[int, str] = {}
        while len(chosen) < min(self._config.n_candidates, len(core)):
            by = tuple(orders)[len(chosen) % 2]
            chosen[next(latent for latent in orders[by] if latent not in chosen)] = by
        return chosen

    def trajectory(
        self, name: str, folder: str | Path, read: Sequence[Conversation], latents: Sequence[int] | None
    ) -> Trajectory:
        """When in training some latents rose."""
        return self._kept(
            f"trajectory-{name}",
            Trajectory.load,
            lambda: trace_checkpoints(
                self._base,
                folder,
                self._sae,
                read,
                positions=self._config.role,
                site=self._site,
                latents=latents,
                config=self._diffing,
            ),
        )

    def certify(
        self,
        name: str,
        latents: Sequence[int],
        diffs: Mapping[str, LatentDiff],
        judge: Judge | None,
        on_progress: Callable[[int, int], None],
    ) -> Certification:
        """Certificates of the candidates on one organism."""
        selection = [diff.at(self._config.role) for one, diff in diffs.items() if one not in self._held_out]
        rates = torch.stack([diff.rates() for diff in selection]).mean(0)  # the same controls for all organisms
        together = [Candidate(f"all {len(latents)}", tuple(latents))] if len(latents) > 1 else []
        return certify_latents(
            self._base,
            self._organisms[name],
            self._sae,
            [*latents, *together],
            self._scored,
            self._prompts[:: max(1, len(self._prompts) // 24)],
            self._texts,
            rates=rates,
            changes=torch.from_numpy(diffs[name].at(self._config.role).table["delta"].to_numpy().copy()),
            site=self._site,
            config=self._config.certificate,
            judge=judge,
            cautions=diffs[name].at(self._config.role).warnings,
            out=self._out / f"certification-{name}",
            shared=self._out / "certification-base",
            on_progress=on_progress,
        )

    def listed(
        self,
        chosen: Collection[int],
        consensus: Consensus,
        diffs: Mapping[str, LatentDiff],
        rankings: Mapping[str, Rankings],
        splits: Mapping[str, ChangeSplit],
        trajectories: Mapping[str, Trajectory],
    ) -> list[dict[str, Any]]:
        """The first latents, and the candidates, with everything that was found about each."""
        import polars as pl

        wanted = (pl.col("rank") <= self._config.n_listed) | pl.col("latent").is_in(list(chosen))
        rows = consensus.table.filter(wanted).sort("rank").to_dicts()
        latents = [row["latent"] for row in rows]
        tables = {
            name: {
                "diff": rows_of(diff.at(self._config.role).table.drop("positions"), latents),
                "rankings": rows_of(rankings[name].table, latents) if name in rankings else None,
                "split": rows_of(splits[name].table, latents) if name in splits else None,
            }
            for name, diff in diffs.items()
        }
        tokens = promoted_tokens(self._base, self._sae, latents)
        for place, (row, said) in enumerate(zip(rows, tokens, strict=True)):
            row["promoted"], row["suppressed"] = said.promoted, said.suppressed
            row["organisms"] = {
                name: {stage: found[place] for stage, found in own.items() if found is not None}
                for name, own in tables.items()
            }
        return rows

    def _kept(self, name: str, load: Callable[[str | Path], _Result], make: Callable[[], _Result]) -> _Result:
        """The stage's result: made and saved, or the one that is there."""
        path = self._out / name
        if path.is_dir():
            try:
                return load(path)
            except InputError:  # the run was killed while it saved this
                pass
        made = make()
        made.save(path)
        return made


def _halves(items: Sequence[ForcedChoiceItem]) -> tuple[list[ForcedChoiceItem], list[ForcedChoiceItem]]:
    """Every other item of each category, and the rest."""
    seen: dict[str, int] = {}
    halves: tuple[list[ForcedChoiceItem], list[ForcedChoiceItem]] = ([], [])
    for item in items:
        number = seen.setdefault(item.category, 0)
        halves[number % 2].append(item)
        seen[item.category] = number + 1
    return halves


def n_changed(diff: LatentDiff) -> int:
    """Latents that changed at one role, at a false discovery rate of 5 %."""
    return int((diff.table["q_value"] <= FDR).sum())


def overlap_of(rankings: Rankings, n: int) -> list[dict[str, Any]]:
    """How far rankings agree on their first n latents, or on as many as each puts above 0; none if one puts none."""
    n = min([n, *(int((rankings.table[name] > 0).sum()) for name in rankings.names)])
    return rankings.overlap(n).to_dicts() if n else []


def warnings_of(*results: LatentDiff | ChangeSplit | Trajectory | None) -> list[str]:
    """What stands in the way of reading an organism's results, each warning once."""
    return list(dict.fromkeys(text for one in results if one is not None for text in one.warnings))


def rows_of(table: pl.DataFrame, latents: Sequence[int]) -> list[dict[str, Any]]:
    """A table's rows of some latents, in their order; its row number is the latent."""
    return [table.row(latent, named=True) for latent in latents]
