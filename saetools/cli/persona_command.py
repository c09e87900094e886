"""The command that goes from a base model, its fine-tunes and an SAE to the persona they woke."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saetools.cli.certify_command import reference_data
from saetools.cli.options import EndpointOptions, ModelOptions, SAEOptions, progress
from saetools.cli.output import check_folder, print_json
from saetools.errors import InputError
from saetools.persona_stages import PersonaConfig


@dataclass(frozen=True)
class Persona:
    """Find the latents that several fine-tunes woke alike, and certify whether they cause the behaviour."""

    out: str
    """Folder for persona.json, and for every stage: a run that was killed goes on."""
    model: ModelOptions = field(default_factory=ModelOptions)
    sae: SAEOptions = field(default_factory=SAEOptions)
    held_out: tuple[str, ...] = ()
    """Names of adapters that take no part in choosing latents."""
    prompts: tuple[str, ...] = ()
    """Files of questions far from the training domains; by default the shipped ones."""
    items: tuple[str, ...] = ()
    """Files of forced-choice items, as JSONL; by default those that are shipped: attitudes and recklessness."""
    n_items: int | None = None
    """Use so many of them, the same number of each category."""
    texts: tuple[str, ...] = ()
    """Files of neutral texts for perplexity; by default 40 shipped ones."""
    config: PersonaConfig = field(default_factory=PersonaConfig)
    judge: EndpointOptions = field(default_factory=EndpointOptions)
    json: bool = False
    """Print the result as one JSON object instead of tables."""

    def __post_init__(self) -> None:
        if not isinstance(self.model.adapters(), dict):
            raise InputError(
                "--adapter",
                expected="two or more as NAME=PATH",
                received=" ".join(self.model.adapter) or "none",
                remedy="name each fine-tune",
            )

    def run(self) -> None:
        """Run all stages and print what was found."""
        from saetools.data import Conversation, load_free_form
        from saetools.evaluate import coherence_judge
        from saetools.persona import find_persona

        check_folder(Path(self.out))
        adapters = self.model.adapters()
        assert isinstance(adapters, dict)  # __post_init__
        questions = [Conversation.chat(item.question, id=item.id) for item in load_free_form()]
        items, prompts, texts = reference_data(self.items, self.n_items, self.prompts, questions, self.texts)
        lm = self.model.load()
        sae, site = self.sae.load(lm)
        endpoint = self.judge.made()
        with progress("persona", "stages") as update:
            found = find_persona(
                lm.base,
                {name: lm.with_adapter(name) for name in adapters},
                sae,
                prompts,
                items,
                texts,
                self.out,
                held_out=self.held_out,
                checkpoints={name: path for name, path in adapters.items() if (Path(path) / "checkpoints").is_dir()},
                site=site,
                config=self.config,
                judge=None if endpoint is None else coherence_judge(endpoint),
                on_progress=update,
            )
        if self.json:
            print_json(found)
        else:
            _print(found)
            print(f"all in {Path(self.out) / 'persona.json'}")


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    organisms = Table("organism", "held out", "shift of the score", "latents changed", "warnings")
    for name, one in found["organisms"].items():
        shift = one["shift"]
        text = f"{shift['mean']:+.3f} [{shift['low']:+.3f}, {shift['high']:+.3f}]"
        changed = json.dumps(one["n_changed"]).strip("{}").replace('"', "")
        organisms.add_row(name, "yes" if one["held_out"] else "", text, changed, "; ".join(one["warnings"]))
    latents = Table("latent", "kind", "stability", "promoted", *(f"{name}: delta" for name in found["organisms"]))
    for row in found["latents"][:20]:
        deltas = (f"{one['diff']['delta']:+.3f}" for one in row["organisms"].values())
        said = " ".join(token.strip() for token in row["promoted"][:5])
        latents.add_row(str(row["latent"]), row["kind"], f"{row['stability']:.2f}", said, *deltas)
    verdicts = Table("candidate", *found["certifications"])
    by_organism = [[one["verdict"] for one in each["certificates"]] for each in found["certifications"].values()]
    names = [one["candidate"]["name"] for one in next(iter(found["certifications"].values()))["certificates"]]
    for name, *row in zip(names, *by_organism, strict=True):
        verdicts.add_row(name, *row)
    for table in (organisms, latents, verdicts):
        Console().print(table)
