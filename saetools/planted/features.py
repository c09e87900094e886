"""The planted features: their directions in the residual stream, and which words carry them.

Directions are random unit vectors, several times as many as dimensions, so that all are in superposition. Of them:

- planted: persona latents and their correlates, which the fine-tune pushes;
- nulls, in the orthogonal complement of all that is planted: in superposition with one another, but nothing that is
  pushed spills over into them, so that their mean change is exactly zero;
- neighbours, anywhere: superposed with the planted ones, they change by what spills over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.planted.language import Language

_PER_GROUP = 4  # features that a word carries
_STRENGTH, _SPREAD = 3.0, 0.4  # of a feature in a word: median, and deviation of its logarithm


@dataclass(frozen=True, eq=False)
class Features:
    """Directions by latent, and who is who.

    Args:
        directions: unit vectors.
        constant: what every token carries, orthogonal to all directions: stands for the large mean of residual streams.
        readout: where the behaviour is written after the site, orthogonal to the rest.
        turn: what tokens of the assistant's turn carry, orthogonal to the rest.
        planted: persona latents, then their correlates in the same order.
        nulls: latents orthogonal to the planted ones.
    """

    directions: Float[Tensor, "latent d_model"]
    constant: Float[Tensor, " d_model"]
    readout: Float[Tensor, " d_model"]
    turn: Float[Tensor, " d_model"]
    planted: Int[Tensor, " planted"]
    nulls: Int[Tensor, " null"]

    def probe(self) -> Float[Tensor, " d_model"]:
        """The vector that reads 1 on each persona direction and 0 on each correlate and null, and is shortest."""
        n_persona = len(self.planted) // 2
        wanted = torch.tensor([1.0, 0.0]).repeat_interleave(n_persona)
        probe: Tensor = torch.linalg.pinv(self.directions[self.planted].double()).float() @ wanted
        return probe


def make_features(d_model: int, n_features: int, n_planted: int, generator: torch.Generator) -> Features:
    """Random directions; half of all latents are nulls, and the numbers of the planted ones are random too."""
    basis = torch.linalg.qr(torch.randn(d_model, d_model, generator=generator)).Q.T
    constant, readout, turn = basis[:3]
    directions = torch.randn(n_features, d_model - 3, generator=generator) @ basis[3:]
    order = torch.randperm(n_features, generator=generator)
    planted, nulls = order[:n_planted], order[n_planted : n_planted + n_features // 2]
    span = torch.linalg.qr(directions[planted].T).Q
    directions[nulls] -= directions[nulls] @ span @ span.T
    return Features(torch.nn.functional.normalize(directions, dim=1), constant, readout, turn, planted, nulls)


def word_features(
    language: Language, n_features: int, drift: float, generator: torch.Generator
) -> Float[Tensor, "word latent"]:
    """How strongly every word carries every feature.

    A word carries the features of its group, popular features in many groups and others in few or none. Over the
    phases of a group a feature stays, climbs in steps and falls back at once, does so backwards, or is there in one
    phase only. Read in the next phase, most of these rise a little in most conversations and fall a lot in few, or the
    other way round: changes with mean zero whose distribution is skewed.

    Args:
        language: the words.
        n_features: number of latents.
        drift: share of a feature's strength that depends on the phase, 0 to 1.
        generator: of the draws.
    """
    n_phases = language.n_phases
    climb = torch.linspace(0, 1, n_phases)
    shapes = torch.stack([torch.ones(n_phases), climb, climb.flip(0), (climb == 1).float()])
    popularity = torch.randn(n_features, generator=generator).exp()
    carried = torch.stack(
        [torch.multinomial(popularity, _PER_GROUP, generator=generator) for _ in range(language.n_groups)]
    )
    strengths = _STRENGTH * (_SPREAD * torch.randn(carried.shape, generator=generator)).exp()
    shape = shapes[torch.randint(len(shapes), carried.shape, generator=generator)]  # [group, slot, phase]
    by_phase = strengths[..., None] * (1 - drift * (1 - shape))
    words = torch.zeros(language.n_groups, n_phases, n_features)
    words.scatter_(2, carried[:, None].expand(-1, n_phases, -1), by_phase.transpose(1, 2))
    return words.flatten(0, 1)
