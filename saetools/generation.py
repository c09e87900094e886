"""Batched, seeded sampling under any edit, several edits side by side."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from saetools.data.conversation import Conversation
from saetools.data.tokenizing import TokenizedConversation, tokenize
from saetools.decoding import Lane, Row
from saetools.errors import InputError, NonFiniteError
from saetools.models.editing import Edits
from saetools.models.language_model import LanguageModel
from saetools.models.layout import is_hooked_transformer

_CROWDED = 0.75  # of its rows that a batch goes on with; when fewer are left, the others are taken out


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
        check_sampling(self.max_new_tokens, self.temperature, self.top_p)
        for name in ("n_samples", "batch_rows"):
            if getattr(self, name) < 1:
                raise InputError(name, expected="1 or more", received=getattr(self, name), remedy="pick another")


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Make sure that answers can be drawn so.

    Raises:
        InputError: naming the setting that is out of range.
    """
    for name, received, good, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "more than 0, at most 1"),
    ):
        if not good:
            raise InputError(name, expected=expected, received=received, remedy="pick another")


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
        broken: whether the model's output became infinite or NaN, which ended it; `generate` raises instead.
    """

    prompt: int
    variant: str
    sample: int
    text: str
    token_ids: tuple[int, ...]
    finished: bool
    broken: bool = False


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
        NonFiniteError: if the model's output becomes infinite or NaN.

    Example:
        >>> [answer.text for answer in generate(lm, ["Say hi."], config=SamplingConfig(8, temperature=0.0))]
        ["Hello there! I'm here to help"]
    """
    variants = {"plain": None} if variants is None else variants
    answers: list[Generation] = []
    for some in generate_batches(lm, prompts, variants, config):
        if broken := [answer.variant for answer in some if answer.broken]:
            raise NonFiniteError(
                f"the output of the model under {broken[0]!r} is not finite; lower the strength of its edits"
            )
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
    """The same, a batch at a time as it is done, by the length of its prompts; answers may be broken.

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


def _answer_batch(
    lm: LanguageModel,
    tokenized: Sequence[TokenizedConversation],
    jobs: Sequence[Job],
    variants: Mapping[str, Edits | None],
    config: SamplingConfig,
) -> list[Generation]:
    lane = Lane(lm)
    rows = {
        job: Row(
            tokenized[job[0]],
            variants[job[1]],
            random_stream(config.seed, job[0], job[2]),
            config.max_new_tokens,
            config.temperature,
            config.top_p,
        )
        for job in jobs
    }
    with lm.active():  # once, not for every token
        lane.admit(list(rows.values()))
        while going := [row for row in lane.rows if not row.is_done]:
            if len(going) <= _CROWDED * len(lane.rows):
                lane.drop([row for row in lane.rows if row.is_done])
            lane.step()
    return [_generation(lm, job, row) for job, row in rows.items()]


def _generation(lm: LanguageModel, job: Job, row: Row) -> Generation:
    prompt, variant, sample = job
    ids = row.answer_ids
    text = lm.tokenizer.decode(ids, skip_special_tokens=True)
    return Generation(prompt, variant, sample, text, tuple(ids), row.finished, row.broken)


def random_stream(seed: int, prompt: int, sample: int) -> torch.Generator:
    """The random numbers of an answer, which depend neither on its batch nor on its edits."""
    digest = hashlib.sha256(f"{seed}/{prompt}/{sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
