"""Commands about latents: where they fire, what they are about, whether they cause the behaviour."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saetools.cli.options import DataOptions, ModelOptions, SAEOptions, at_least, progress
from saetools.cli.output import check_folder, print_json, printable, write_text
from saetools.data import Positions
from saetools.errors import InputError
from saetools.evaluate import CertificateConfig
from saetools.interpret import ExplainConfig

if TYPE_CHECKING:
    from saetools.data import Conversation, ForcedChoiceItem
    from saetools.evaluate import Candidate, Certification, Judge
    from saetools.latent_diff import LatentDiff
    from saetools.models import LanguageModel


@dataclass(frozen=True)
class TunedOptions:
    """A base model and its fine-tune."""

    model: ModelOptions = field(default_factory=ModelOptions)
    tuned: str | None = None
    """The fine-tune, where it is a model and no adapter; loaded with the base's options, --revision aside."""

    def __post_init__(self) -> None:
        if (self.tuned is None) == (not self.model.adapter):
            raise InputError(
                "--adapter", expected="either --adapter or --tuned", received="both or none", remedy="give one"
            )

    def load(self) -> tuple[LanguageModel, LanguageModel]:
        """Both models; an adapter is a view of its base."""
        lm = self.model.load()
        if self.tuned is None:
            return lm.base, lm
        return lm, dataclasses.replace(self.model, model=self.tuned, revision=None).load()


@dataclass(frozen=True)
class EndpointOptions:
    """A language model behind an OpenAI-compatible address; its key is read from OPENAI_API_KEY."""

    endpoint: str | None = None
    """Its address, such as http://localhost:8000/v1."""
    llm: str | None = None
    """The model, as the server calls it."""
    timeout: float = 60.0
    """Seconds until a request counts as lost."""
    max_concurrent: int = 4
    """Requests in flight at the same time."""

    def __post_init__(self) -> None:
        if (self.endpoint is None) != (self.llm is None):
            raise InputError(
                "--endpoint", expected="both --endpoint and --llm, or none", received="one", remedy="add the other"
            )

    def made(self) -> Any:
        """The endpoint, or `None`."""
        from saetools.endpoint import Endpoint

        if self.endpoint is None or self.llm is None:
            return None
        return Endpoint(self.endpoint, self.llm, timeout=self.timeout, max_concurrent=self.max_concurrent)


@dataclass(frozen=True)
class Certify:
    """Find out which latents of a diff cause the behaviour, by steering base and fine-tune beside random controls."""

    diff: str
    """Folder that `saetools diff` wrote: its largest increases are the candidates."""
    out: str
    """Folder for base.jsonl and tuned.jsonl, from which a killed run goes on, and certification.json."""
    pair: TunedOptions = field(default_factory=TunedOptions)
    sae: SAEOptions = field(default_factory=SAEOptions)
    positions: Positions | None = None
    """Role of the diff; needed where it has several."""
    n_top: int = 10
    """Candidates: the largest increases at a false discovery rate of 5 %, and the set of them."""
    latents: tuple[int, ...] = ()
    """Candidates to take instead."""
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

    def run(self) -> None:
        """Certify, save, print the verdicts."""
        from saetools.data import Conversation, load_free_form
        from saetools.diff import LatentDiff
        from saetools.evaluate import certify_latents, coherence_judge

        check_folder(Path(self.out))
        found = LatentDiff.load(self.diff)
        found = found if self.positions is None else found.at(self.positions)
        candidates = self._candidates(found)
        questions = [Conversation.chat(item.question, id=item.id) for item in load_free_form()[:24]]
        items, prompts, texts = reference_data(self.items, self.n_items, self.prompts, questions, self.texts)
        base, tuned = self.pair.load()
        sae, site = self.sae.load(base)
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
                site=site,
                config=self.config,
                judge=judge,
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

    def _candidates(self, found: LatentDiff) -> list[Candidate | int]:
        import polars as pl

        from saetools.changes import FDR
        from saetools.evaluate import Candidate

        found.check_single_role()
        if self.latents:
            chosen = list(self.latents)
        else:
            sure = found.top(len(found.table)).filter((pl.col("q_value") <= FDR) & (pl.col("delta") > 0))
            chosen = sure["latent"].head(self.n_top).to_list()
        if not chosen:
            raise InputError(
                "--diff", expected="latents that rose at q <= 0.05", received="none", remedy="give --latents"
            )
        together = [Candidate(f"all {len(chosen)}", tuple(chosen))] if len(chosen) > 1 else []
        return [*chosen, *together]


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

    table = Table("candidate", "verdict", "base: strength", "shift", "q", "tuned: strength", "shift", "q")
    for row in found.table().iter_rows(named=True):
        cells = []
        for side in ("induces", "suppresses"):
            ends = (row[f"{side}_shift"], row[f"{side}_shift_low"], row[f"{side}_shift_high"])
            strength, q_value = row[f"{side}_strength"], row[f"{side}_q"]
            cells += ["" if strength is None else f"{strength:g}", shown(*ends)]
            cells.append("" if q_value is None else f"{q_value:.1e}")
        table.add_row(row["candidate"], row["verdict"], *cells)
    Console().print(table)
    print(f"organism against base: {found.shift}")
    print(f"certification in {out}")


@dataclass(frozen=True)
class Index:
    """Write a latent store: which latents fire where in a corpus, in base and fine-tune."""

    read: DataOptions
    out: str
    """Folder of the store; a run that was killed goes on."""
    model: ModelOptions = field(default_factory=ModelOptions)
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
        lm = self.model.load()
        sae, site = self.sae.load(lm)
        models = {"base": lm.base} | ({} if lm.adapter is None else {"tuned": lm})
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
    local: ModelOptions | None = None
    """Ask a model that is run here instead."""
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
                "--endpoint", expected="an endpoint or a local model", received="both or none", remedy="give one"
            )

    def run(self) -> None:
        """Explain, print explanations with their scores."""
        from saetools.endpoint import Budget
        from saetools.interpret import explain_latents, store_passages
        from saetools.latents import LatentStore

        store = LatentStore(self.store)
        model = self.acts_of or store.models[-1]
        explainer = self.ask.made() if self.local is None else self.local.load()
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
    model: ModelOptions = field(default_factory=ModelOptions)
    sae: SAEOptions = field(default_factory=SAEOptions)
    order: Literal["value", "increase", "decrease"] | None = None
    """Of latents on a text; by default the increase over the base where there is a fine-tune."""
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
        if self.text is not None:
            rows = self._by_text(self.text)
        elif self.token is not None:
            rows = self._by_token(self.token)
        else:
            rows = self._by_explanation(str(self.explanation))
        if self.json:
            print_json({"hits": rows})
            return
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        if not rows:
            print("no latent")
            return
        table = Table(*rows[0])
        for row in rows:
            cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
            table.add_row(*(escape(printable(cell)) for cell in cells))
        Console().print(table)

    def _by_text(self, text: str) -> list[dict[str, Any]]:
        from saetools.interpret import search_text

        lm = self.model.load()
        sae, site = self.sae.load(lm)
        models = {"base": lm.base} | ({} if lm.adapter is None else {"tuned": lm})
        order = self.order or ("value" if lm.adapter is None else "increase")
        found = search_text(models, sae, text, order=order, n=self.n, site=site)
        rows = []
        for hit in found.hits:
            acts = hit.acts[list(models)[-1]]
            peak = max(range(len(acts)), key=lambda place: acts[place])
            rows.append({"latent": hit.latent, **hit.values, "strongest on": found.tokens[peak]})
        return rows

    def _by_token(self, token: str) -> list[dict[str, Any]]:
        from saetools.latents import LatentStore

        return [dataclasses.asdict(hit) for hit in LatentStore(str(self.store)).latents_for_token(token, self.n)]

    def _by_explanation(self, query: str) -> list[dict[str, Any]]:
        from saetools.interpret import load_explanations, load_text_encoder, search_explanations

        encoder = None if self.encoder is None else load_text_encoder(self.encoder)
        hits = search_explanations(load_explanations(str(self.log)), query, encoder=encoder, n=self.n)
        return [{"latent": hit.explanation.latent, "score": hit.score, "text": hit.explanation.text} for hit in hits]
