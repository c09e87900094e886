"""Commands about latents: where they fire, what they are about, which of them fit a text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saetools.cli.options import (
    DataOptions,
    EndpointOptions,
    ModelOptions,
    PairOptions,
    SAEOptions,
    at_least,
    progress,
)
from saetools.cli.output import check_folder, print_json, printable
from saetools.errors import InputError
from saetools.interpret import ExplainConfig

if TYPE_CHECKING:
    from saetools.endpoint import Endpoint
    from saetools.models import LanguageModel


@dataclass(frozen=True)
class Index:
    """Write a latent store: which latents fire where in a corpus, in base and fine-tune."""

    read: DataOptions
    out: str
    """Folder of the store; a run that was killed goes on."""
    pair: PairOptions = field(default_factory=PairOptions)
    sae: SAEOptions = field(default_factory=SAEOptions)
    max_tokens: int = 512
    """Longer texts become several documents, longer chats are cut."""

    def run(self) -> None:
        """Index; each file is a dataset."""
        from saetools.latents import index_latents

        check_folder(Path(self.out))
        corpus = {
            Path(file).stem: dataclasses.replace(self.read, data=(file,)).conversations() for file in self.read.data
        }
        models = self.pair.models()
        sae, site = self.sae.load(models["base"])
        with progress("index", "stages") as update:
            store = index_latents(
                models, sae, corpus, self.out, site=site, max_tokens=self.max_tokens, on_progress=update
            )
        print(
            f"{len(store)} tokens of {len(store.datasets)} datasets, read by {', '.join(store.models)}, in {self.out}"
        )


@dataclass(frozen=True)
class Explain:
    """Explain latents in words, by a language model that is then tested on passages it has not seen."""

    store: str
    """Folder that `saetools index` wrote."""
    latents: tuple[int, ...]
    """Which latents."""
    out: str
    """JSONL file: one line a latent; latents that it holds are not asked about again."""
    ask: EndpointOptions = field(default_factory=EndpointOptions)
    local: str | None = None
    """Instead of an endpoint, ask a model that is run here: built-in name, directory, GGUF file or hub id. It needs a
    chat template, and small models explain nothing."""
    acts_of: str | None = None
    """Model of the store whose activations are explained; by default the last one."""
    config: ExplainConfig = field(default_factory=ExplainConfig)
    max_requests: int | None = None
    """Send no more than so many."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        at_least(1, "the number of --latents", len(self.latents))
        if (self.ask.endpoint is None) == (self.local is None):
            raise InputError(
                "--endpoint",
                expected="who explains: --endpoint and --llm, or --local for a model that is run here",
                received="none" if self.local is None else "both",
                remedy="give one",
            )

    def _explainer(self) -> Endpoint | LanguageModel:
        return self.ask.made() if self.local is None else ModelOptions(self.local).load()

    def run(self) -> None:
        """Explain, print explanations with their scores."""
        from saetools.endpoint import Budget
        from saetools.interpret import explain_latents, store_passages
        from saetools.latents import LatentStore

        store = LatentStore(self.store)
        model = self.acts_of or store.models[-1]
        explainer = self._explainer()
        with progress("explain", "latents") as update:
            found = explain_latents(
                self.latents,
                store_passages(store, model=model, seed=self.config.seed),
                explainer,
                acts_of=model,
                config=self.config,
                log=self.out,
                budget=Budget(max_requests=self.max_requests),
                on_progress=update,
            )
        if self.json:
            print_json(dataclasses.asdict(found))
        else:
            _print_explanations(found.explanations)
            print(f"{found.n_requests} requests, {found.n_tokens} tokens; {len(found.unfinished)} latents are left")


def _print_explanations(explanations: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("latent", "explanation", "detection", "fuzzing", "failed", show_lines=True)
    for one in explanations:
        scores = ["" if score is None else str(score) for score in (one.detection, one.fuzzing)]
        text = "none" if one.text is None else escape(printable(one.text))
        table.add_row(str(one.latent), text, *scores, "; ".join(f"{each.step}: {each.reason}" for each in one.failures))
    Console().print(table)


@dataclass(frozen=True)
class Search:
    """Find latents by a text they fire on, by a token that wakes them, or by their explanation."""

    text: str | None = None
    """A sentence: which latents fire on it, in the fine-tune against the base if there is one."""
    token: str | None = None
    """A token, with its leading space: which latents it wakes in a store."""
    explanation: str | None = None
    """Words: which explanations fit them."""
    pair: PairOptions = field(default_factory=PairOptions)
    sae: SAEOptions = field(default_factory=SAEOptions)
    order: Literal["value", "increase", "decrease"] | None = None
    """Of latents on a text; by default the increase over the base where there is a fine-tune."""
    over: Literal["max", "mean"] = "max"
    """What of a latent's activations on a text: the largest, or the mean over its tokens (without the first, an
    attention sink)."""
    store: str | None = None
    """Folder that `saetools index` wrote."""
    log: str | None = None
    """File that `saetools explain` wrote."""
    encoder: str | None = None
    """Folder of a sentence encoder, to search explanations by meaning; without it words are compared."""
    n: int = 20
    """Most latents to list."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        at_least(1, "--n", self.n)
        asked = [name for name in ("text", "token", "explanation") if getattr(self, name) is not None]
        if len(asked) != 1:
            raise InputError(
                "--text",
                expected="one of --text, --token and --explanation",
                received=" and ".join(asked) or "none",
                remedy="ask one question",
            )
        for name, needed in (("token", "store"), ("explanation", "log")):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise InputError(f"--{needed}", expected=f"what --{name} searches", received="none", remedy="give it")

    def run(self) -> None:
        """Search and print."""
        note = ""
        if self.text is not None:
            answer, rows, note = self._by_text(self.text)
        else:
            rows = self._by_explanation(str(self.explanation)) if self.token is None else self._by_token(self.token)
            answer = {"hits": rows}
        if self.json:
            print_json(answer)
            return
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        if rows:
            table = Table(*rows[0])
            for row in rows:
                cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
                table.add_row(*(escape(printable(cell)) for cell in cells))
            Console().print(table)
        else:
            print("no latent")
        if note:
            print(note)

    def _by_text(self, text: str) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
        """The whole answer, the rows of a table, and what is to be said of it."""
        from saetools.interpret import search_text
        from saetools.sae.identity import sae_sha256

        models = self.pair.models()
        sae, site = self.sae.load(models["base"])
        order = self.order or ("increase" if "tuned" in models else "value")
        found = search_text(models, sae, text, over=self.over, order=order, n=self.n, site=site)
        asked: dict[str, Any] = {"text": text, "over": self.over, "order": order}
        asked |= {"sae": sae_sha256(sae), "site": str(site)}
        asked |= {"models": {name: lm.describe() for name, lm in models.items()}}
        rows = []
        for hit in found.hits:
            acts = hit.acts[list(models)[-1]]
            peak = max(range(len(acts)), key=lambda place: acts[place])
            rows.append({"latent": hit.latent, **hit.values, "strongest on": found.tokens[peak]})
        note = f"{found.n_active} latents fire on it; its first token, an attention sink, is left out"
        return {**dataclasses.asdict(found), "provenance": asked}, rows, note

    def _by_token(self, token: str) -> list[dict[str, Any]]:
        from saetools.latents import LatentStore

        return [dataclasses.asdict(hit) for hit in LatentStore(str(self.store)).latents_for_token(token, self.n)]

    def _by_explanation(self, query: str) -> list[dict[str, Any]]:
        from saetools.interpret import load_explanations, load_text_encoder, search_explanations

        encoder = None if self.encoder is None else load_text_encoder(self.encoder)
        hits = search_explanations(load_explanations(str(self.log)), query, encoder=encoder, n=self.n)
        return [{"latent": hit.explanation.latent, "score": hit.score, "text": hit.explanation.text} for hit in hits]
