"""Random controls of an edit: any damage to a model widens gaps between log-probabilities, so an effect has to beat it.

Neighbouring rows of a batch get different directions, so that intervals over items hold the chance in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.errors import InputError
from saetools.evaluate.perplexity import measure_perplexity
from saetools.models.language_model import LanguageModel
from saetools.models.replay import LayerReplay
from saetools.models.site import Site
from saetools.models.where import Edit, Where
from saetools.sae.model import SAE
from saetools.steer.scope import Scope

_GRID = 1.6  # ratio of neighbouring scales when looking for one of equal perplexity
_TOLERANCE = 0.02  # of log-perplexity
_TRIES = 12
_POOL = 4  # latents to draw from, for each that is wanted
_MOST_STEPS = round(math.log(64, _GRID))


def random_directions(n: int, d_model: int, *, seed: int) -> Float[Tensor, "direction d_model"]:
    """Random unit vectors."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d_model, generator=generator), dim=1)


@dataclass(frozen=True, eq=False)
class RandomPush:
    """Adds a random direction to the residual stream, the same on all tokens of a row, another for the next row.

    Batches of as many rows as there are directions use all of them alike.

    Args:
        directions: unit vectors; row r of a batch gets number r modulo their number.
        length: of what is added; negative to subtract.
        scope: tokens it is added to.
    """

    directions: Float[Tensor, "direction d_model"]
    length: float
    scope: Scope

    def __call__(self, acts: Tensor, where: Where) -> Tensor:
        """Edit the activations of a pass."""
        steps = self.length * self.directions.to(acts.device)[where.rows % len(self.directions)]
        pushed = acts + steps[:, None]  # in float32 or better
        return torch.where(self.scope(where)[..., None], pushed, acts).to(acts.dtype)


class PerplexityCurve:
    """Perplexity under random directions as a function of their length, measured where needed.

    Args:
        lm: the model.
        site: where they are added.
        directions: unit vectors, as for `RandomPush`.
        scope: tokens they are added to.
        texts: reference texts.
        known: perplexities by length, that of length 0 among them; what is measured is added.
        replay: what layers below the site computed.
    """

    def __init__(
        self,
        lm: LanguageModel,
        site: Site,
        directions: Float[Tensor, "direction d_model"],
        scope: Scope,
        texts: Sequence[str],
        known: dict[float, float],
        replay: LayerReplay,
    ) -> None:
        self._lm, self._site, self._directions, self._scope, self._texts = lm, site, directions, scope, texts
        self._replay = replay
        self._known = known

    def step(self, scale: float) -> Edit:
        """The directions added at this length."""
        return RandomPush(self._directions, scale, self._scope)

    def at(self, scale: float) -> float:
        """Perplexity with the directions added at this length."""
        if scale not in self._known:
            edits = {self._site: self.step(scale)}
            self._known[scale] = measure_perplexity(self._lm, self._texts, edits=edits, replay=self._replay).value
        return self._known[scale]

    def scale_for(self, perplexity: float, *, start: float) -> float:
        """The length that costs so much perplexity, within 2 %; 0 if that is no more than none costs.

        If no length up to 64 times `start` costs as much, the longest. The search begins on a grid that does not depend
        on `start`, so that what was measured for one perplexity serves for others, and gives the same length whatever
        was measured before.
        """
        if math.log(perplexity / self.at(0.0)) <= _TOLERANCE or start <= 0:
            return 0.0
        first = step = round(math.log(start, _GRID))
        while self.at(_GRID**step) < perplexity and step < first + _MOST_STEPS:
            step += 1
        while self.at(_GRID ** (step - 1)) >= perplexity and step > first - _MOST_STEPS:
            step -= 1

        def excess(scale: float) -> float:
            return math.log(self.at(scale) / perplexity)

        low, high = _GRID ** (step - 1), _GRID**step
        low = low if excess(low) < 0 else 0.0
        for attempt in range(_TRIES):
            nearest = min((low, high), key=lambda scale: abs(excess(scale)))
            if abs(excess(nearest)) <= _TOLERANCE or excess(high) <= 0:
                break
            share = excess(low) / (excess(low) - excess(high))  # for small steps the cost grows as the square
            halfway = math.sqrt(low * high) if low else high / _GRID
            middle = halfway if attempt % 2 else math.sqrt(low**2 + share * (high**2 - low**2))
            low, high = (middle, high) if excess(middle) < 0 else (low, middle)
        return nearest


def matched_latents(
    sae: SAE,
    latents: Sequence[int],
    rates: Float[Tensor, " d_sae"],
    n: int,
    *,
    excluded: Sequence[int] = (),
    seed: int = 0,
) -> Int[Tensor, "control latent"]:
    """Random sets of latents, each latent drawn from those nearest to a given one in decoder norm and firing rate.

    Distance is that of the logarithms; the draw is from the nearest four times as many as are wanted. Within a set no
    latent serves twice.

    Args:
        sae: the SAE.
        latents: what is to be matched.
        rates: firing rate of every latent.
        n: sets.
        excluded: latents that may not serve.
        seed: of the draw.

    Raises:
        InputError: if there are not enough others.
    """
    free = torch.ones(sae.d_sae, dtype=torch.bool)
    free[list({*latents, *excluded})] = False
    n_free = int(free.sum())
    if n_free < max(n, len(latents)):
        raise InputError(
            "n_matched", expected=f"at most {n_free}, the latents that are no candidates", received=n, remedy="lower it"
        )
    floor = 1e-6
    features = torch.stack(
        [rates.clamp_min(floor).log(), sae.W_dec.detach().float().norm(dim=1).cpu().clamp_min(floor).log()], 1
    )
    generator = torch.Generator().manual_seed(seed)
    size = min(n_free, _POOL * max(n, len(latents)))
    pools = []
    for latent in latents:
        distance = (features - features[latent]).norm(dim=1).masked_fill(~free, math.inf)
        pool = distance.topk(size, largest=False).indices
        pools.append(pool[torch.randperm(size, generator=generator)].tolist())
    drawn: list[list[int]] = []
    for number in range(n):
        chosen: list[int] = []
        for pool in pools:
            in_turn = (pool[(number + further) % size] for further in range(size))
            chosen.append(next(latent for latent in in_turn if latent not in chosen))
        drawn.append(chosen)
    return torch.tensor(drawn)
