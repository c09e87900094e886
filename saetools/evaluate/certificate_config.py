"""Settings of a certification."""

from __future__ import annotations

import math
from dataclasses import dataclass

from saetools.errors import InputError


@dataclass(frozen=True)
class CertificateConfig:
    """Settings of a certification."""

    strengths: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    """In median residual norms; the base is steered by plus, the tuned model by minus so much."""
    n_refine: int = 2
    """Halvings of the gap between the largest coherent strength and the next, which was not."""
    max_incoherent: float = 0.1
    """Largest share of incoherent answers (arXiv 2506.19823), or that of the unedited model where it is larger."""
    perplexity_factor: float = 2.0
    """An answer is incoherent if its perplexity under the base is more than so many times that of the least likely of
    twenty answers of the unedited model,"""
    max_repetition: float = 0.5
    """or a larger share of its trigrams repeats (and more than in one of twenty unedited answers),"""
    min_judged: float = 50.0
    """or a judge, if there is one, gives it less."""
    max_new_tokens: int = 32
    """Length of the answers that are looked at for coherence, drawn at temperature 1."""
    n_samples: int = 1
    """Answers to each prompt."""
    batch_rows: int = 64
    """Answers generated together."""
    n_matched: int = 32
    """Random latents that are near in decoder norm and firing rate and no candidates, dealt to the items in turn; at
    most half as many as there are items."""
    n_directions: int = 32
    """Random directions, dealt in turn; at most half as many as there are items."""
    fdr: float = 0.05
    """False discovery rate at which an effect holds, over all candidates and both models."""
    min_share: float = 0.05
    """Least share of the organism's shift, by the lower end of its interval, that an effect has to make up to hold; not
    asked for where the organism does not score above its base."""
    round_size: int = 4
    """Candidates whose answers at all strengths are generated together."""
    max_minutes: float | None = None
    """Start no further measurement after so long; candidates left are `untested`."""
    max_tokens: int | None = None
    """Start no further measurement after so many tokens, read or generated."""
    seed: int = 0
    """Of answers, random directions and the bootstrap."""

    def __post_init__(self) -> None:
        for name, expected, least in (
            ("n_refine", "0 or more", 0),
            ("max_new_tokens", "1 or more", 1),
            ("n_samples", "1 or more", 1),
            ("batch_rows", "1 or more", 1),
            ("n_matched", "1 or more", 1),
            ("n_directions", "1 or more", 1),
            ("round_size", "1 or more", 1),
        ):
            if getattr(self, name) < least:
                raise InputError(name, expected=expected, received=getattr(self, name), remedy="raise it")
        for name, most in (("max_minutes", math.inf), ("max_tokens", math.inf), ("min_judged", 100.0)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise InputError(name, expected=f"0 to {most:g}", received=value, remedy="pick another")
        if not self.perplexity_factor >= 1:
            raise InputError(
                "perplexity_factor", expected="1 or more", received=self.perplexity_factor, remedy="raise it"
            )
        for name in ("max_incoherent", "max_repetition", "fdr", "min_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(name, expected="0 to 1", received=getattr(self, name), remedy="pick a share")
        strengths = self.strengths
        if not strengths or min(strengths) <= 0 or list(strengths) != sorted(set(strengths)):
            raise InputError(
                "strengths", expected="ascending, above 0", received=strengths, remedy="signs are given by the model"
            )
