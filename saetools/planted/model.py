"""A small transformer and its organism, built so that the latents that a fine-tune woke are known.

For measuring methods, not models: what `diff_latents` finds, how often its intervals and tests are right, whether a
causal certificate tells latents that drive the behaviour from those that only rise with them. Nothing is trained.

The base is a Llama of four layers. Word embeddings are sparse sums of more feature directions than there are
dimensions; the layers up to the site add to them by random weights. The organism is a LoRA adapter that does two
things. It reads every word in the next phase (`saetools.planted.language`), so that every feature changes, most of them
by nothing on average. And in the MLP before the site it pushes the residual along the planted directions: in prompts on
some tokens, many for strong latents and few for weak ones, and all of them throughout the assistant's turn. After the
site a neuron reads the persona directions, not their correlates, and writes what the head turns into misaligned words.
Correlates are pushed on the same tokens by the same amount as their personas.

Simpler than a real organism: latents are the true features, the site's SAE has no dead or split ones, and behaviour is
almost linear in the persona latents (norms make it a little less).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.data.conversation import Conversation
from saetools.data.shipped import ForcedChoiceItem
from saetools.data.tokenizing import tokenize
from saetools.errors import InputError
from saetools.models.language_model import LanguageModel
from saetools.planted.features import make_features, word_features
from saetools.planted.language import ALIGNED_WORDS, MISALIGNED_WORDS, Language, draw_prompts, make_language
from saetools.planted.weights import N_HEADS, N_NEURONS, PUSH, make_base, make_organism, make_sae, set_triggers
from saetools.sae.model import SAE

_REFERENCE_SEED, _ITEM_SEED, _PROMPT_SEED = 1_000_001, 1_000_002, 1_000_003  # apart from the seeds users draw with


@dataclass(frozen=True)
class PlantedConfig:
    """How large the planted model is and what is planted."""

    strengths: tuple[float, ...] = (0.8, 0.25, 0.08, 0.025)
    """Mean push along a latent's direction over tokens of prompts, in units of activation: 4 times the share pushed."""
    n_each: int = 2
    """Persona latents of each strength, and as many correlates."""
    d_model: int = 128
    """Width; a multiple of 4."""
    n_features: int = 384
    """Feature directions, which are the SAE's latents."""
    drift: float = 1.0
    """Share of a feature that depends on a word's phase, 0 to 1; with 0 only planted latents change."""
    n_prompts: int = 64
    """Prompts that come with the model; `draw_prompts` makes others."""
    n_items: int = 32
    """Forced-choice items."""
    seed: int = 0
    """Of everything."""

    def __post_init__(self) -> None:
        n_planted = 2 * self.n_each * len(self.strengths)
        weak_enough = bool(self.strengths) and all(0 < one <= PUSH / 2 for one in self.strengths)
        for name, right, expected in (
            ("strengths", weak_enough, f"some numbers above 0, up to {PUSH / 2:g}"),
            ("n_each", self.n_each >= 1 and n_planted < N_NEURONS, f"1 or more, and fewer than {N_NEURONS} planted"),
            ("d_model", self.d_model % N_HEADS == 0 and self.d_model >= n_planted + 8, f"4 n, {n_planted + 8} or more"),
            ("n_features", self.n_features >= max(2 * n_planted, self.d_model), "d_model, twice the planted, or more"),
            ("drift", 0 <= self.drift <= 1, "0 to 1"),
            ("n_prompts", self.n_prompts >= 1, "1 or more"),
            ("n_items", self.n_items >= 2, "2 or more"),
        ):
            if not right:
                raise InputError(
                    name,
                    expected=expected,
                    received=getattr(self, name),
                    remedy=f"change it, or plant fewer than {n_planted} latents",
                )


@dataclass(frozen=True, eq=False)
class PlantedModel:
    """A base model, its organism, their SAE, and the truth about its latents.

    Args:
        base: the model before the fine-tune.
        tuned: the organism: an adapter on the same weights.
        sae: a JumpReLU SAE of the site whose decoder rows are the feature directions. Its latents do not compete for
            slots as those of TopK would, so that what is pushed into one moves no other but by geometry.
        persona: latents that the fine-tune raises and that drive the behaviour, strongest first.
        correlates: as many latents that it raises on the same tokens by the same push, and that the behaviour ignores.
        strengths: push of each persona latent, and of its correlate.
        nulls: latents whose mean change is exactly zero, though they change in most conversations.
        neighbours: the other latents: what is pushed spills over into them.
        effects: how far a unit along a latent's direction moves the readout of the behaviour: 1 for persona latents,
            0 for correlates and nulls, what its direction shares with the personas' for a neighbour.
        prompts: independent draws.
        items: forced-choice items; their answers are aligned and misaligned words.
        language: what prompts are drawn from.
        config: settings.
    """

    base: LanguageModel
    tuned: LanguageModel
    sae: SAE
    persona: tuple[int, ...]
    correlates: tuple[int, ...]
    strengths: tuple[float, ...]
    nulls: tuple[int, ...]
    neighbours: tuple[int, ...]
    effects: Float[Tensor, " latent"]
    prompts: tuple[Conversation, ...]
    items: tuple[ForcedChoiceItem, ...]
    language: Language
    config: PlantedConfig


def plant_model(config: PlantedConfig = PlantedConfig(), *, pushed: bool = True) -> PlantedModel:
    """Build a base model and an organism whose woken latents are known; the same for the same settings.

    Args:
        config: size, what is planted, and seed.
        pushed: whether the fine-tune pushes anything. If not, it only reads words in the next phase, and all latents
            are nulls.

    Example:
        >>> planted = plant_model()
        >>> len(planted.persona), planted.sae.d_sae, planted.tuned.d_model
        (8, 384, 128)
        >>> found = diff_latents(planted.base, planted.tuned, planted.sae, planted.prompts, positions="prompt")
        >>> set(planted.persona[:2]) <= set(found.top(16)["latent"])
        True
    """
    generator = torch.Generator().manual_seed(config.seed)
    language = make_language(generator)
    n_persona = config.n_each * len(config.strengths)
    features = make_features(config.d_model, config.n_features, 2 * n_persona, generator)
    carried = word_features(language, config.n_features, config.drift, generator)
    base = make_base(language, features, carried, generator, seed=config.seed)
    prompts = draw_prompts(language, 256, seed=_REFERENCE_SEED)
    reference = list(tokenize(prompts, base.tokenizer, add_generation_prompt=True))
    pushes = torch.tensor(config.strengths).repeat_interleave(config.n_each)
    mean_steps = set_triggers(base, language, features, carried, pushes / PUSH, reference, generator)
    sae = make_sae(base, features, carried, reference)
    tuned = make_organism(base, language, features, carried, pushes, mean_steps, pushed=pushed)
    every = range(config.n_features)
    planted = features.planted.tolist() if pushed else []
    nulls = features.nulls.tolist() if pushed else every
    return PlantedModel(
        base=tuned.base,
        tuned=tuned,
        sae=sae,
        persona=tuple(planted[:n_persona]),
        correlates=tuple(planted[n_persona:]),
        strengths=tuple(pushes.tolist()) if pushed else (),
        nulls=tuple(sorted(nulls)),
        neighbours=tuple(sorted(set(every) - set(planted) - set(nulls))),
        effects=features.directions @ features.probe(),
        prompts=tuple(draw_prompts(language, config.n_prompts, seed=_PROMPT_SEED)),
        items=_items(language, config.n_items, generator),
        language=language,
        config=config,
    )


def _items(language: Language, n: int, generator: torch.Generator) -> tuple[ForcedChoiceItem, ...]:
    """Questions of the language with three aligned or three misaligned words as answers."""
    answers = [
        [" ".join(words[index] for index in torch.randperm(len(words), generator=generator)[:3]) for _ in range(n)]
        for words in (ALIGNED_WORDS, MISALIGNED_WORDS)
    ]
    return tuple(
        ForcedChoiceItem(f"planted-{number}", "planted", prompt.messages[0].content, aligned, misaligned)
        for number, (prompt, aligned, misaligned) in enumerate(
            zip(draw_prompts(language, n, seed=_ITEM_SEED), *answers, strict=True)
        )
    )
