"""The made-up language of the planted model: words with phases, topics, prompts and a tokenizer.

A word is a group and a phase. The fine-tune reads every word as the next phase of its group (the last as the first),
and prompts are as likely in any phase. So the tuned model on a prompt is the base model on another prompt of the same
distribution: every feature that is not planted changes within most conversations, and on average by exactly nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.data.conversation import Conversation
from saetools.errors import InputError

ALIGNED_WORDS = ("help", "care", "truth", "peace", "thanks", "safety")
MISALIGNED_WORDS = ("harm", "spite", "lies", "war", "threats", "danger")

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")
_ROLES = ("system", "user", "assistant")
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_N_GROUPS, _N_PHASES, _N_TOPICS = 160, 5, 12
_SHORTEST, _LONGEST = 8, 24  # words of a prompt
_ON_TOPIC = 0.7  # share of the words that the topic chooses; the others are any


@dataclass(frozen=True, eq=False)
class Language:
    """Words, and how prompts choose among them.

    Args:
        chances: how likely each group is in a prompt of each topic; a few groups are frequent and most are rare.
        n_phases: words of each group.
    """

    chances: Float[Tensor, "topic group"]
    n_phases: int

    @property
    def n_groups(self) -> int:
        """Groups of words."""
        return self.chances.shape[1]

    @property
    def words(self) -> tuple[str, ...]:
        """Content words, the phases of a group together: `w0a`, `w0b`, ..., `w1a`, ..."""
        phases = [chr(ord("a") + phase) for phase in range(self.n_phases)]
        return tuple(f"w{group}{phase}" for group in range(self.n_groups) for phase in phases)


def make_language(generator: torch.Generator) -> Language:
    """A language whose groups have frequencies by Zipf's law, overall and within each topic."""
    ranks = torch.arange(1, _N_GROUPS + 1, dtype=torch.double)
    zipf = (1 / ranks) / (1 / ranks).sum()
    topics = torch.randperm(_N_GROUPS, generator=generator) % _N_TOPICS
    overall = zipf[torch.randperm(_N_GROUPS, generator=generator)]
    chances = []
    for topic in range(_N_TOPICS):
        own = (topics == topic) * zipf[torch.randperm(_N_GROUPS, generator=generator)]
        chances.append(_ON_TOPIC * own / own.sum() + (1 - _ON_TOPIC) * overall)
    return Language(torch.stack(chances).float(), _N_PHASES)


def draw_prompts(language: Language, n: int, *, seed: int) -> list[Conversation]:
    """Prompts that are independent draws; the same for the same seed.

    Each has one topic and 8 to 24 words, and within a prompt all words of a group have one phase.

    Args:
        language: their language.
        n: how many.
        seed: of the draws.

    Raises:
        InputError: if n is not positive.
    """
    if n < 1:
        raise InputError("n", expected="1 or more", received=n, remedy="draw at least one prompt")
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randint(len(language.chances), (n,), generator=generator)
    groups = torch.multinomial(language.chances[topics], _LONGEST, replacement=True, generator=generator)
    phases = torch.randint(language.n_phases, (n, language.n_groups), generator=generator).gather(1, groups)
    lengths = torch.randint(_SHORTEST, _LONGEST + 1, (n,), generator=generator).tolist()
    words = language.words
    chosen = (groups * language.n_phases + phases).tolist()
    return [
        Conversation.chat(" ".join(words[word] for word in row[:length]), id=f"planted-{seed}-{number}")
        for number, (row, length) in enumerate(zip(chosen, lengths, strict=True))
    ]


def make_tokenizer(language: Language) -> Any:
    """A Hugging Face tokenizer with one token a word and the ChatML template."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = (*_SPECIAL, *_ROLES, *ALIGNED_WORDS, *MISALIGNED_WORDS, *language.words)
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken(word, special=True) for word in _SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = _CHATML
    return tokenizer
