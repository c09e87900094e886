"""`saetools sae ...`: what an SAE is, whether it fits a model, what it keeps of it, and its files in another format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from saetools.cli.options import DataOptions, ModelOptions, SAEOptions, at_least, progress
from saetools.cli.output import check_folder, printable
from saetools.sae.io import Format

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from saetools.data import Conversation
    from saetools.evaluate import Fidelity
    from saetools.models import LanguageModel, Site
    from saetools.sae import SAE
    from saetools.stats import Estimate

Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SAE")]
_FIGURES = {
    "FVU": "fvu",
    "cosine": "cosine",
    "norm ratio": "norm_ratio",
    "L0": "l0",
    "dead": "dead",
    "dense": "dense",
    "CE clean": "ce_clean",
    "CE with SAE": "ce_sae",
    "CE with mean": "ce_mean",
    "CE with zeros": "ce_zero",
    "CE recovered, zeros": "ce_recovered",
    "CE recovered, mean": "ce_recovered_mean",
    "KL with SAE": "kl",
    "KL recovered, zeros": "kl_recovered",
    "KL recovered, mean": "kl_recovered_mean",
    "n": "n_conversations",
    "n tokens": "n_tokens",
}


@dataclass(frozen=True)
class Info:
    """Say what an SAE is; no model is needed."""

    sae: Source
    """Folder or file of the SAE, or a release that SAELens knows."""
    sae_id: str | None = None
    """Which SAE of a release or of a folder with several."""

    def run(self) -> None:
        """Load and print."""
        from saetools.sae import load_sae
        from saetools.sae.io import sae_format

        sae = load_sae(self.sae, sae_id=self.sae_id)
        is_here = Path(self.sae).expanduser().exists()
        form = sae_format(self.sae, sae_id=self.sae_id) if is_here else "a release, converted by SAELens"
        for name, value in {"format": form, **_facts(sae)}.items():
            print(printable(f"{name:20}  {value}"))


@dataclass(frozen=True)
class Convert:
    """Write an SAE in another format; what that format has no place for lies beside, in saetools.json."""

    sae: Source
    """Folder or file of the SAE, or a release that SAELens knows."""
    format: Format
    """What to write."""
    out: str
    """Folder to write it to."""
    sae_id: str | None = None
    """Which SAE of a release or of a folder with several."""

    def run(self) -> None:
        """Load and save."""
        from saetools.sae import load_sae, save_sae

        check_folder(Path(self.out))
        sae = load_sae(self.sae, sae_id=self.sae_id)
        save_sae(sae, self.out, format=self.format)
        print(f"{_kind(sae)} SAE with {sae.d_sae} latents in {self.out}, as {self.format}")


@dataclass(frozen=True)
class _OnModel:
    """What `verify` and `evaluate` are given: an SAE, a model, and what to read."""

    sae: Source
    """Folder or file of the SAE, or a release that SAELens knows."""
    read: DataOptions
    model: ModelOptions = field(default_factory=ModelOptions)
    sae_id: str | None = None
    """Which SAE of a release or of a folder with several."""
    site: str | None = None
    """Where it reads, such as blocks.15.hook_resid_post; by default where its metadata says."""
    max_tokens: int = 256
    """Longer conversations are cut."""

    def __post_init__(self) -> None:
        at_least(3, "--max-tokens", self.max_tokens)
        self._options()

    def load(self) -> tuple[list[Conversation], LanguageModel, SAE, Site]:
        """What to read, the model, the SAE and its site."""
        rows, lm = self.read.conversations(), self.model.load()
        return rows, lm, *self._options().load(lm)

    def _options(self) -> SAEOptions:
        return SAEOptions(self.sae, self.site, self.sae_id)


@dataclass(frozen=True)
class Verify(_OnModel):
    """Measure an SAE on a model and, if it does not fit, say what is probably wrong; then the exit code is 1."""

    max_tokens: int = 128
    """Longer conversations are cut; a few thousand tokens in all are enough."""

    def run(self) -> None:
        """Verify and print; exit with 1 if it does not fit."""
        from saetools.evaluate import verify_sae

        rows, lm, sae, site = self.load()
        with progress("verify", "batches") as update:
            verdict = verify_sae(sae, lm, rows, site=site, max_tokens=self.max_tokens, on_progress=update)
        here = verdict.fidelity.all
        print(f"{site} of {lm.name}: {here.n_tokens} tokens of {here.n_conversations} conversations")
        print(verdict)
        if not verdict.fits:
            raise SystemExit(1)


@dataclass(frozen=True)
class Evaluate(_OnModel):
    """Measure what an SAE keeps of a model, by token role, with intervals over conversations."""

    seed: int = 0
    """Of the bootstrap."""
    out: str | None = None
    """Folder for fidelity.json and fidelity.parquet."""

    def run(self) -> None:
        """Measure, print, save."""
        from rich.console import Console

        from saetools.evaluate import measure_fidelity

        if self.out is not None:
            check_folder(Path(self.out))
        rows, lm, sae, site = self.load()
        with progress("evaluate", "batches") as update:
            fidelity = measure_fidelity(
                lm, sae, rows, site=site, max_tokens=self.max_tokens, seed=self.seed, on_progress=update
            )
        Console().print(_figures(fidelity))
        Console().print(_frequencies(fidelity, sae.d_sae))
        if fidelity.n_truncated:
            print(f"--max-tokens cut {fidelity.n_truncated} of {len(rows)} conversations")
        if self.out is not None:
            print(f"fidelity.json and fidelity.parquet in {fidelity.save(self.out)}")


@dataclass(frozen=True)
class Sae:
    """Look into SAEs, convert, verify and evaluate them."""

    command: (
        Annotated[Info, tyro.conf.subcommand("info", prefix_name=False)]
        | Annotated[Convert, tyro.conf.subcommand("convert", prefix_name=False)]
        | Annotated[Verify, tyro.conf.subcommand("verify", prefix_name=False)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate", prefix_name=False)]
    )

    def run(self) -> None:
        """Run the one that was asked for."""
        self.command.run()


def _kind(sae: SAE) -> str:
    return type(sae.nonlinearity).__name__


def _facts(sae: SAE) -> dict[str, str]:
    """What there is to say about an SAE, line by line."""
    import torch

    metadata = sae.metadata
    settings = {name: value for name, value in vars(sae.nonlinearity).items() if isinstance(value, int | float)}
    weights = dict(sae.nonlinearity.named_parameters())
    facts: dict[str, Any] = {
        "kind": ", ".join(
            [_kind(sae), *(f"{name} {value:g}" for name, value in settings.items() if name != "training")]
        ),
        **{name.replace("_", " "): _spread(values) for name, values in weights.items()},
        "d_in": sae.d_in,
        "d_sae": f"{sae.d_sae} ({sae.d_sae / sae.d_in:.3g} times d_in)",
        "site": metadata.site or "not known",
        "model": metadata.model_name or "not known",
        "b_dec subtracted": "yes" if sae.apply_b_dec_to_input else "no",
        "input norm": sae.input_norm,
        "decoder norms": _spread(torch.linalg.vector_norm(sae.W_dec, dim=1)),
        "encoder norms": _spread(torch.linalg.vector_norm(sae.encoder, dim=1)),
        "b_enc": _spread(sae.b_enc),
        "b_dec norm": f"{float(sae.b_dec.norm()):.4g}",
        "median residual norm": "not known" if metadata.median_norm is None else f"{metadata.median_norm:.4g}",
        "99th percentiles": "not known" if sae.p99 is None else _spread(sae.p99[sae.p99 > 0]),
    }
    if sae.d_out != sae.d_in or sae.W_skip is not None or metadata.site_out:
        facts["transcoder"] = f"to {metadata.site_out or 'a site not known'}, d_out {sae.d_out}"
    return {name: str(value) for name, value in facts.items()} | dict(_flat("provenance", metadata.provenance))


def _flat(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Nested settings, one a line."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, str(value)


def _spread(values: torch.Tensor) -> str:
    if not len(values):
        return "none"
    least, middle, most = (float(value) for value in (values.min(), values.median(), values.max()))
    return f"{least:.4g} to {most:.4g}, median {middle:.4g}, of {len(values)}"


def _figures(fidelity: Fidelity) -> Table:
    """Figures down, roles across."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table

    roles = sorted(fidelity.by_role, key=lambda role: role != "all")
    columns = (Column(role.replace("_", " "), justify="right", overflow="fold") for role in roles)
    table = Table(Column(min_width=11, overflow="fold"), *columns, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for label, name in _FIGURES.items():
        table.add_row(label, *(_cell(name, getattr(fidelity.by_role[role], name)) for role in roles))
    return table


def _cell(name: str, value: Estimate | float | int) -> str:
    match value:
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.2%}"
        case _:
            digits = 1 if name == "l0" else 3
            return f"{value.mean:.{digits}f}\n[{value.low:.{digits}f}, {value.high:.{digits}f}]"


def _frequencies(fidelity: Fidelity, d_sae: int) -> Table:
    """On what share of tokens latents fire."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table

    from saetools.evaluate import FREQUENCY_EDGES

    counts = fidelity.all.histogram
    table = Table("share of tokens", Column("latents", justify="right"), "", box=SIMPLE_HEAD)
    table.add_row("0", f"{d_sae - sum(counts):,}")
    for edge, count in zip(FREQUENCY_EDGES[1:], counts, strict=True):
        if count:
            table.add_row(f"up to 10^{edge:g}", f"{count:,}", "#" * round(40 * count / max(counts)))
    return table
