"""Batched, seeded sampling under any edit, several edits side by side."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.data.conversation import Conversation
from saetools.data.tokenizing import TokenizedConversation, pad, tokenize
from saetools.errors import InputError
from saetools.models.editing import Edit, Edits, Stackable, Where, as_sequence, edit
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


Job = tuple[int, str, int]
"""Number of a prompt, name of a variant, number of a sample."""


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
    variants = {"plain": None} if variants is None else variants
    answers: list[Generation] = []
    for some in generate_batches(lm, prompts, variants, config):
        answers += some
        if on_progress is not None:
            on_progress(len(answers), len(prompts) * len(variants) * config.n_samples)
    order = {variant: number for number, variant in enumerate(variants)}
    return sorted(answers, key=lambda answer: (answer.prompt, order[answer.variant], answer.sample))


def generate_batches(
    lm: LanguageModel,
    prompts: Sequence[Conversation | str],
    variants: Mapping[str, Edits | None],
    config: SamplingConfig,
    *,
    skip: Collection[Job] = (),
) -> Iterator[list[Generation]]:
    """The same, a batch at a time as it is done, by the length of its prompts.

    Args:
        lm: the model.
        prompts: as of `generate`.
        variants: edits by name, `None` for the model as it is.
        config: sampling settings.
        skip: answers that are not wanted.

    Raises:
        InputError: as `generate`.
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
    tokenized = tokenize_prompts(lm, prompts)
    longest = max(map(len, tokenized), default=0) + config.max_new_tokens
    lm.check_length(longest, argument="prompts and config.max_new_tokens")
    jobs = [
        (prompt, variant, sample)
        for prompt in sorted(range(len(prompts)), key=lambda prompt: len(tokenized[prompt]))
        for variant in variants
        for sample in range(config.n_samples)
        if (prompt, variant, sample) not in skip
    ]
    for start in range(0, len(jobs), config.batch_rows):
        yield _answer_batch(lm, tokenized, jobs[start : start + config.batch_rows], variants, config)


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


@torch.inference_mode()
def _answer_batch(
    lm: LanguageModel,
    tokenized: Sequence[TokenizedConversation],
    jobs: Sequence[Job],
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


def _generation(lm: LanguageModel, job: Job, row: list[int], stops: set[int]) -> Generation:
    length = next((i for i, token in enumerate(row) if token in stops), len(row))
    text = lm.tokenizer.decode(row[:length], skip_special_tokens=True)
    prompt, variant, sample = job
    return Generation(prompt, variant, sample, text, tuple(row[:length]), finished=length < len(row))


class PerRow:
    """Another edit for every row of a batch, so that several run side by side; those of one structure run as one.

    Args:
        edits: one per row; `None` leaves a row alone.
    """

    def __init__(self, edits: Sequence[Edit | None]) -> None:
        self._groups: list[tuple[Int[Tensor, " row"], Edit]] = []
        self._n_rows = len(edits)
        rows_of: dict[Hashable, list[int]] = {}
        for row, fn in enumerate(edits):
            if fn is not None:
                rows_of.setdefault(fn.structure() if isinstance(fn, Stackable) else id(fn), []).append(row)
        for rows in rows_of.values():
            fns, index = [edits[row] for row in rows], torch.tensor(rows)
            first = fns[0]
            assert first is not None
            alike = all(fn is first for fn in fns)
            self._groups.append(
                (index, first if alike or not isinstance(first, Stackable) else first.stacked(fns, index))
            )

    def __call__(self, acts: Tensor, where: Where) -> Tensor:
        """Edit each row of a pass by its own edit."""
        out = acts
        for rows, fn in self._groups:
            if len(rows) == self._n_rows:
                return fn(acts, where)
            index = torch.isin(where.rows, rows.to(where.rows.device)).nonzero()[:, 0]
            if len(index):
                out = out.index_copy(0, index, fn(acts[index], where[index]).to(acts.dtype))
        return out


def combine_rows(row_edits: Sequence[Edits | None]) -> dict[Site, list[Edit]]:
    """Edits for a batch in which every row has edits of its own.

    Args:
        row_edits: the edits of each row, `None` for none.
    """
    sites = {site for edits in row_edits if edits is not None for site in edits}
    combined: dict[Site, list[Edit]] = {}
    for site in sorted(sites):
        chains = [as_sequence(edits[site]) if edits is not None and site in edits else () for edits in row_edits]
        combined[site] = [PerRow(stage) for stage in zip_longest(*chains)]
    return combined


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
