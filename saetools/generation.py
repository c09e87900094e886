"""Batched, seeded sampling under any edit, several edits side by side."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.data.conversation import Conversation
from saetools.data.tokenizing import TokenizedConversation, pad, tokenize
from saetools.errors import InputError
from saetools.models.editing import Edit, Edits, Where, edit
from saetools.models.forward import final_hidden, logits
from saetools.models.language_model import LanguageModel
from saetools.models.layout import is_hooked_transformer
from saetools.models.site import Site


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are drawn."""

    max_new_tokens: int = 64
    """Longest answer."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with so much probability."""
    n_samples: int = 1
    """Answers per prompt."""
    seed: int = 0
    """Each answer has a random stream of its own, made of the seed, its prompt's number and its sample's number, so
    that it depends neither on the batch nor on the edit."""
    batch_rows: int = 24
    """Answers generated together."""

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("n_samples", self.n_samples >= 1, "1 or more"),
            ("batch_rows", self.batch_rows >= 1, "1 or more"),
        ):
            if not good:
                raise InputError(name, expected=expected, received=getattr(self, name), remedy="pick another")


@dataclass(frozen=True)
class Generation:
    """One answer.

    Args:
        prompt: number of the prompt in the sequence that was given.
        variant: name of the edits it was made under.
        sample: number of the sample.
        text: the answer, without special tokens.
        token_ids: its tokens, without the one that ended it.
        finished: whether it ended by itself.
    """

    prompt: int
    variant: str
    sample: int
    text: str
    token_ids: tuple[int, ...]
    finished: bool


@torch.inference_mode()
def generate(
    lm: LanguageModel,
    prompts: Sequence[Conversation | str],
    *,
    variants: Mapping[str, Edits | None] | None = None,
    config: SamplingConfig = SamplingConfig(),
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Answer prompts under one or several sets of edits, which share a batch.

    Args:
        lm: the model.
        prompts: conversations that end with the user's turn, or plain user messages.
        variants: edits by name, `None` for the model as it is; by default that alone, as `"plain"`.
        config: sampling settings.
        on_progress: called with answers done and answers in all.

    Returns:
        Answers ordered by prompt, then variant, then sample.

    Raises:
        InputError: for a prompt that ends with an answer, for prompts and answers longer than the model's context, or
            for a `HookedTransformer`, whose cache is another.

    Example:
        >>> [answer.text for answer in generate(lm, ["Say hi."], config=SamplingConfig(8, temperature=0.0))]
        ["Hello there! I'm here to help"]
    """
    if is_hooked_transformer(lm.model):
        raise InputError(
            "lm",
            expected="a Hugging Face model or a TransformerBridge",
            received="a HookedTransformer",
            remedy="wrap the Hugging Face model: edits and residuals are the same",
        )
    if isinstance(prompts, str):
        raise InputError("prompts", expected="a list of prompts", received="a string", remedy="pass [prompt]")
    variants = {"plain": None} if variants is None else variants
    tokenized = tokenize_prompts(lm, prompts)
    longest = max(map(len, tokenized), default=0) + config.max_new_tokens
    lm.check_length(longest, argument="prompts and config.max_new_tokens")
    jobs = [
        (prompt, variant, sample)
        for prompt in sorted(range(len(prompts)), key=lambda prompt: len(tokenized[prompt]))
        for variant in variants
        for sample in range(config.n_samples)
    ]
    answers: list[Generation] = []
    for start in range(0, len(jobs), config.batch_rows):
        answers += _answer_batch(lm, tokenized, jobs[start : start + config.batch_rows], variants, config)
        if on_progress is not None:
            on_progress(len(answers), len(jobs))
    order = {variant: number for number, variant in enumerate(variants)}
    return sorted(answers, key=lambda answer: (answer.prompt, order[answer.variant], answer.sample))


def tokenize_prompts(lm: LanguageModel, prompts: Sequence[Conversation | str]) -> list[TokenizedConversation]:
    """Prompts with the tokens that open an answer.

    Raises:
        InputError: for a prompt that ends with an answer.
    """
    conversations = [Conversation.chat(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    for number, conversation in enumerate(conversations):
        if not conversation.is_prompt:
            raise InputError(
                "prompts",
                expected="conversations that end with the user's turn",
                received=f"prompt {number}, which does not",
                remedy="drop the last answer",
            )
    return list(tokenize(conversations, lm.tokenizer, add_generation_prompt=True))


def _answer_batch(
    lm: LanguageModel,
    tokenized: Sequence[TokenizedConversation],
    jobs: Sequence[tuple[int, str, int]],
    variants: Mapping[str, Edits | None],
    config: SamplingConfig,
) -> list[Generation]:
    from transformers import DynamicCache

    batch = pad([tokenized[prompt] for prompt, _, _ in jobs], range(len(jobs)), pad_left=True)
    ends = torch.tensor(sorted(end_tokens(lm)), device=lm.device)
    streams = [_random_stream(config.seed, prompt, sample) for prompt, _, sample in jobs]
    edits = combine_rows([variants[variant] for _, variant, _ in jobs])
    token_ids, mask = batch.token_ids.to(lm.device), batch.mask.to(lm.device)
    new: list[Tensor] = []
    finished = torch.zeros(len(jobs), dtype=torch.bool, device=lm.device)
    with lm.active(), edit(lm, edits, roles=batch.roles):
        cache = DynamicCache(config=lm.model.config)
        for _ in range(config.max_new_tokens):
            hidden = final_hidden(lm, token_ids, mask, cache=cache)[:, -1]
            chosen = choose_tokens(logits(lm, hidden).float(), config, streams).to(lm.device)
            new.append(chosen)
            finished |= torch.isin(chosen, ends)
            if bool(finished.all()):
                break
            token_ids = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(jobs), 1)], dim=1)
    answers = torch.stack(new, dim=1).tolist()
    stops = set(ends.tolist())
    return [_generation(lm, job, row, stops) for job, row in zip(jobs, answers, strict=True)]


def _generation(lm: LanguageModel, job: tuple[int, str, int], row: list[int], stops: set[int]) -> Generation:
    length = next((i for i, token in enumerate(row) if token in stops), len(row))
    text = lm.tokenizer.decode(row[:length], skip_special_tokens=True)
    prompt, variant, sample = job
    return Generation(prompt, variant, sample, text, tuple(row[:length]), finished=length < len(row))


@dataclass(frozen=True, eq=False)
class PerRow:
    """Another edit for every row of a batch, so that several run side by side.

    Args:
        edits: one per row; `None` leaves a row alone.
    """

    edits: tuple[Edit | None, ...]

    def __call__(self, acts: Tensor, where: Where) -> Tensor:
        """Edit each row of a pass by its own edit."""
        by_edit: dict[int, list[int]] = {}
        for entry, row in enumerate(where.rows.tolist()):
            by_edit.setdefault(id(self.edits[row]), []).append(entry)
        out = acts.clone()
        for entries in by_edit.values():
            fn = self.edits[int(where.rows[entries[0]])]
            if fn is not None:
                index = torch.tensor(entries, device=acts.device)
                out[index] = fn(acts[index], where[index])
        return out


def combine_rows(row_edits: Sequence[Edits | None]) -> dict[Site, Edit]:
    """Edits for a batch in which every row has edits of its own.

    Args:
        row_edits: the edits of each row, `None` for none.
    """
    sites = {site for edits in row_edits if edits is not None for site in edits}
    chains: dict[int, Edit | None] = {}

    def at(edits: Edits | None, site: Site) -> Edit | None:
        fns = None if edits is None else edits.get(site)
        if not isinstance(fns, Sequence):
            return fns
        return chains.setdefault(id(fns), _chain(fns))

    return {site: PerRow(tuple(at(edits, site) for edits in row_edits)) for site in sorted(sites)}


def _chain(fns: Sequence[Edit]) -> Edit:
    def run(acts: Tensor, where: Where) -> Tensor:
        for fn in fns:
            acts = fn(acts, where)
        return acts

    return run


def end_tokens(lm: LanguageModel) -> set[int]:
    """Ids of the tokens that end an answer."""
    settings = getattr(lm.model, "generation_config", None)
    configured = getattr(settings, "eos_token_id", None)
    ids = set(configured) if isinstance(configured, list) else {configured}
    return {token for token in ids | {lm.tokenizer.eos_token_id} if token is not None}


def _random_stream(seed: int, prompt: int, sample: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{prompt}/{sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def choose_tokens(
    scores: Float[Tensor, "row vocab"], config: SamplingConfig, streams: Sequence[torch.Generator]
) -> Int[Tensor, " row"]:
    """One token a row: by inverting the cumulative distribution at one uniform number of the row's own stream."""
    if config.temperature == 0:
        return scores.argmax(-1)
    probs = torch.softmax(scores.double() / config.temperature, dim=-1)
    uniform = torch.stack([torch.rand((), generator=stream, dtype=torch.double) for stream in streams]).to(probs.device)
    if config.top_p >= 1:
        cumulative = probs.cumsum(-1)
        return (
            torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:])
            .squeeze(1)
            .clamp_(max=probs.shape[1] - 1)
        )
    ordered, tokens = probs.sort(-1, descending=True)
    cumulative = ordered.cumsum(-1)
    kept = torch.where(cumulative - ordered < config.top_p, ordered, 0.0).cumsum(-1)
    place = torch.searchsorted(kept, uniform[:, None] * kept[:, -1:]).clamp_(max=probs.shape[1] - 1)
    return tokens.gather(1, place).squeeze(1)
