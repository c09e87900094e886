"""From a base model, some of its fine-tunes and one SAE to the persona they woke: every analysis in its order, kept.

Diffs of every organism against the base on the same text; what they agree on, organisms apart that take no part in
the selection; how other rankings order latents; how much of the change is representation and how much is what is said;
when in training it came; and certificates of the first candidates, on every organism. Each stage is saved when it is
done, and a run that was killed goes on. For one question alone, call the stage itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from saetools.data.conversation import Conversation
from saetools.data.shipped import ForcedChoiceItem
from saetools.diff import LatentDiff
from saetools.evaluate.certificate import Certification
from saetools.evaluate.coherence import Judge
from saetools.models.language_model import LanguageModel
from saetools.models.site import Site
from saetools.persona_stages import PersonaConfig, Stages, n_changed, overlap_of, rows_of, warnings_of
from saetools.provenance import plain, write_json
from saetools.rankings import Rankings
from saetools.readings import ChangeSplit
from saetools.sae.identity import sae_site
from saetools.sae.model import SAE
from saetools.trajectory import Trajectory

_RESULT = "persona.json"


def find_persona(
    base: LanguageModel,
    organisms: Mapping[str, LanguageModel],
    sae: SAE,
    prompts: Sequence[Conversation],
    items: Sequence[ForcedChoiceItem],
    texts: Sequence[str],
    out: str | Path,
    *,
    held_out: Collection[str] = (),
    checkpoints: Mapping[str, str | Path] | None = None,
    site: Site | None = None,
    config: PersonaConfig = PersonaConfig(),
    judge: Judge | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Find the latents that several fine-tunes woke alike, and whether they cause what the fine-tunes have in common.

    Args:
        base: the model before the fine-tunes.
        organisms: fine-tunes by name, such as their domains; two or more that take part in the selection.
        sae: an SAE of the base with a median residual norm.
        prompts: questions far from the training domains; the base's own answers to them are what all models read.
        items: forced-choice items: every other one of each category ranks latents (attribution, direction), the rest
            score behaviour for the certificates.
        texts: neutral texts, for perplexity.
        out: folder for `persona.json`, the result, and a folder for each stage.
        held_out: organisms that take no part in choosing latents.
        checkpoints: folders of fine-tunes that were saved on their way, by organism.
        site: where the SAE reads; by default what its metadata says.
        config: settings.
        judge: scores coherence of answers under edits.
        on_progress: called with stages done, stages in all and the name of the next.

    Returns:
        The result, as in `persona.json`: organisms with scores, adequacy and numbers of changed latents; ranked latents
        with the statistics of every organism; held-out organisms apart; overlap of rankings; share of representation;
        onsets; certificates, none if no latent rose in all selection organisms; settings and provenance.

    Raises:
        InputError: for fewer than two selection organisms, unknown names, or a folder of another run.
    """
    import polars as pl

    search = Stages(base, organisms, sae, prompts, items, texts, Path(out), held_out, site or sae_site(sae), config)
    traced = dict(checkpoints or {})
    search.check(traced)
    selection = [name for name in organisms if name not in held_out]
    stages = (
        [("behaviour", ""), ("answers", "")]
        + [("diff", name) for name in organisms]
        + [("consensus", "")]
        + [(stage, name) for name in selection for stage in ("rankings", "split")]
        + [("trajectory", name) for name in traced]
        + [("certify", name) for name in organisms]
    )
    numbers = {stage: number for number, stage in enumerate(stages)}

    def tell(stage: str, name: str = "", further: str = "") -> None:
        if on_progress is not None:
            on_progress(numbers[stage, name], len(stages), f"{stage} {name}".strip() + further)

    tell("behaviour")
    scores = search.scores()
    tell("answers")
    read = search.base_answers()
    diffs: dict[str, LatentDiff] = {}
    for name in organisms:
        tell("diff", name)
        diffs[name] = search.diff(name, read)
    tell("consensus")
    consensus = search.consensus(diffs)
    rankings: dict[str, Rankings] = {}
    splits: dict[str, ChangeSplit] = {}
    for name in selection:
        tell("rankings", name)
        rankings[name] = search.rankings(name, diffs[name])
        tell("split", name)
        splits[name] = search.split(name)
    chosen = search.candidates(consensus, rankings)
    trajectories: dict[str, Trajectory] = {}
    for name, folder in traced.items():
        tell("trajectory", name)
        trajectories[name] = search.trajectory(name, folder, read, list(chosen) or None)
    certifications: dict[str, Certification] = {}
    for name in organisms if chosen else ():
        tell("certify", name)

        def measured(done: int, total: int, name: str = name) -> None:
            tell("certify", name, f" ({done} of {total} measurements)")

        certifications[name] = search.certify(name, list(chosen), diffs, judge, measured)
    result: dict[str, Any] = plain(
        {
            "organisms": {
                name: {
                    "held_out": name in held_out,
                    **scores[name],
                    "warnings": warnings_of(diff, splits.get(name), trajectories.get(name)),
                    "adequacy": {role: one.to_json() for role, one in diff.adequacy.items()},
                    "n_changed": {role: n_changed(diff.at(role)) for role in diff.positions},
                }
                for name, diff in diffs.items()
            },
            "base": scores["base"],
            "role": config.role,
            "candidates": [{"latent": latent, "by": by} for latent, by in chosen.items()],
            "latents": search.listed(chosen, consensus, diffs, rankings, splits, trajectories),
            "kinds": dict(consensus.table["kind"].value_counts().iter_rows()),
            "replication": consensus.replication.to_dicts(),
            "held_out": consensus.held_out.filter(pl.col("latent").is_in(list(chosen))).to_dicts(),
            "overlap": {name: overlap_of(one, config.n_overlap) for name, one in rankings.items()},
            "representation": {name: dataclasses.asdict(one.share) for name, one in splits.items()},
            "onsets": {name: rows_of(one.table, list(chosen)) for name, one in trajectories.items()},
            "certifications": {name: one.to_json() for name, one in certifications.items()},
            "settings": dataclasses.asdict(config),
            "provenance": search.identity,
        }
    )
    write_json(Path(out) / _RESULT, result)
    return result
