"""The command that finds out whether latents of a diff cause the behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saetools.cli.options import (
    DataOptions,
    EndpointOptions,
    SAEOptions,
    TunedOptions,
    at_least,
    progress,
    warn,
)
from saetools.cli.output import check_folder, print_json
from saetools.data import Positions
from saetools.errors import InputError
from saetools.evaluate import CertificateConfig
from saetools.provenance import write_text

if TYPE_CHECKING:
    from saetools.data import Conversation, ForcedChoiceItem
    from saetools.evaluate import Candidate, Certification, Judge
    from saetools.latent_diff import LatentDiff
    from saetools.models import Site
    from saetools.sae import SAE


@dataclass(frozen=True)
class Certify:
    """Find out which latents of a diff cause the behaviour, by steering base and fine-tune beside random controls."""

    diff: str
    """Folder that `saetools diff` wrote with this SAE: its largest increases are the candidates."""
    out: str
    """Folder for base.jsonl and tuned.jsonl, from which a killed run goes on, and certification.json."""
    pair: TunedOptions = field(default_factory=TunedOptions)
    sae: SAEOptions = field(default_factory=SAEOptions)
    positions: Positions | None = None
    """Role of the diff; needed where it has several."""
    n_top: int = 10
    """Candidates: the largest increases at a false discovery rate of 5 %, and the set of them."""
    latents: tuple[int, ...] = ()
    """Candidates to take instead. Those that the fine-tune lowered are steered down in the base, up in the fine-tune;
    together they are a set, so all have to have changed the same way."""
    items: tuple[str, ...] = ()
    """Files of forced-choice items, as JSONL with id, category, question, aligned, misaligned; by default those that
    are shipped: attitudes and recklessness."""
    n_items: int | None = None
    """Score so many of them, the same number of each category."""
    prompts: tuple[str, ...] = ()
    """Files of prompts that are answered to see coherence; by default 24 shipped questions."""
    texts: tuple[str, ...] = ()
    """Files of neutral texts for perplexity; by default 40 shipped ones."""
    config: CertificateConfig = field(default_factory=CertificateConfig)
    judge: EndpointOptions = field(default_factory=EndpointOptions)
    json: bool = False
    """Print the certification as one JSON object instead of a table."""

    def __post_init__(self) -> None:
        at_least(1, "--n-top", self.n_top)
        if twice := sorted({latent for latent in self.latents if self.latents.count(latent) > 1}):
            raise InputError("--latents", expected="each latent once", received=f"{twice[0]} twice", remedy="drop one")

    def run(self) -> None:
        """Certify, save, print the verdicts."""
        from saetools.data import Conversation, load_free_form
        from saetools.diff import LatentDiff
        from saetools.evaluate import certify_latents, coherence_judge

        check_folder(Path(self.out))
        diff = LatentDiff.load(self.diff)
        found = diff if self.positions is None else diff.at(self.positions)
        candidates = self._candidates(found)
        for text in found.warnings:
            warn(f"the diff in {self.diff}, {text}")
        questions = [Conversation.chat(item.question, id=item.id) for item in load_free_form()[:24]]
        items, prompts, texts = reference_data(self.items, self.n_items, self.prompts, questions, self.texts)
        base, tuned = self.pair.load()
        sae, site = self.sae.load(base)
        _check_sae(found, sae, site)
        at_response = diff.at("response").table["delta"].to_torch() if "response" in diff.positions else None
        if at_response is None:
            warn(
                "the diff has not read the role `response`: what the fine-tune's own change of a latent carries of the "
                "shift stays unknown (diff with --positions prompt response)"
            )
        endpoint = self.judge.made()
        judge: Judge | None = None if endpoint is None else coherence_judge(endpoint)
        with progress("certify", "measurements") as update:
            certification = certify_latents(
                base,
                tuned,
                sae,
                candidates,
                items,
                prompts,
                texts,
                rates=found.rates(),
                changes=at_response,
                site=site,
                config=self.config,
                judge=judge,
                cautions=[f"diff, {text}" for text in found.warnings],
                out=self.out,
                on_progress=update,
            )
        for one in certification.certificates:
            if one.verdict != "untested":
                name = one.candidate.name.replace(" ", "-")
                write_text(Path(self.out) / f"{name}.html", certification.figure(one.candidate.name).to_html())
        if self.json:
            print_json(certification.to_json())
        else:
            _print_certification(certification, self.out)

    def _candidates(self, found: LatentDiff) -> list[Candidate]:
        import polars as pl

        from saetools.changes import FDR
        from saetools.evaluate import Candidate

        found.check_single_role()
        chosen = list(self.latents)
        if bad := [latent for latent in chosen if not 0 <= latent < len(found.table)]:
            raise InputError(
                "--latents",
                expected=f"latents of 0 to {len(found.table) - 1}",
                received=bad[0],
                remedy="choose latents of the diff",
            )
        if not chosen:
            sure = found.top(len(found.table)).filter((pl.col("q_value") <= FDR) & (pl.col("delta") > 0))
            chosen = sure["latent"].head(self.n_top).to_list()
        if not chosen:
            raise InputError(
                "--diff", expected="latents that rose at q <= 0.05", received="none", remedy="give --latents"
            )
        delta = dict(zip(found.table["latent"], found.table["delta"], strict=True))
        down = [latent for latent in chosen if delta[latent] < 0]
        if 0 < len(down) < len(chosen):
            raise InputError(
                "--latents",
                expected="latents that the fine-tune all raised, or all lowered: together they are steered as one set",
                received=f"{len(down)} of {len(chosen)} lowered, such as {down[0]}",
                remedy="certify them in two runs",
            )
        sign = -1 if down else 1
        together = [Candidate(f"all {len(chosen)}", tuple(chosen), sign)] if len(chosen) > 1 else []
        return [*(Candidate(f"latent {latent}", (latent,), sign) for latent in chosen), *together]


def _check_sae(found: LatentDiff, sae: SAE, site: Site) -> None:
    """Refuse a diff that was made with another SAE, or at another site."""
    from saetools.sae.identity import sae_sha256

    for option, key, ours in (("--sae", "sae", sae_sha256(sae)), ("--site", "site", str(site))):
        if found.provenance[key] != ours:
            raise InputError(
                option,
                expected=f"that of the diff, {found.provenance[key][:40]}",
                received=ours[:40],
                remedy="give the one that the diff was made with",
            )


def reference_data(
    item_files: tuple[str, ...],
    n_items: int | None,
    prompt_files: tuple[str, ...],
    prompts: list[Any],
    text_files: tuple[str, ...],
) -> tuple[list[ForcedChoiceItem], list[Conversation], list[str]]:
    """Items, prompts and neutral texts: those of the files, or the shipped ones."""
    from saetools.data import load_forced_choice, load_voices, shipped_path
    from saetools.demo import choose_items

    shipped = [str(shipped_path(f"evaluation/{name}.jsonl")) for name in ("forced_choice", "reckless")]
    items = [item for file in item_files or shipped for item in load_forced_choice(file)]
    asked = DataOptions(prompt_files).conversations() if prompt_files else prompts
    read = DataOptions(text_files).conversations() if text_files else []
    texts = [one.text or one.messages[-1].content for one in read] or [pair.neutral for pair in load_voices()[:40]]
    return items if n_items is None else choose_items(items, n_items), asked, texts


def _print_certification(found: Certification, out: str) -> None:
    from rich.console import Console
    from rich.table import Table

    def shown(value: float | None, low: float | None, high: float | None) -> str:
        return "" if value is None else f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"

    columns = ("strength", "shift", "share", "carried", "q")
    table = Table("candidate", "verdict", *(f"{side}: {name}" for side in ("base", "tuned") for name in columns))
    for row in found.table().iter_rows(named=True):
        cells = []
        for side in ("induces", "suppresses"):
            strength, q_value = row[f"{side}_strength"], row[f"{side}_q"]
            cells.append("" if strength is None else f"{strength:g}")
            names = (f"{side}_{name}" for name in ("shift", "share", "carried"))
            cells += [shown(row[name], row[f"{name}_low"], row[f"{name}_high"]) for name in names]
            cells.append("" if q_value is None else f"{q_value:.1e}")
        table.add_row(row["candidate"], row["verdict"], *cells)
    Console().print(table)
    print(f"organism against base: {found.shift}")
    print(f"certification in {out}")
