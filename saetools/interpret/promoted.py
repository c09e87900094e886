"""What a latent is about: the tokens that its direction promotes and suppresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from saetools.errors import InputError
from saetools.histogram import Histogram
from saetools.models.forward import logits
from saetools.models.language_model import LanguageModel
from saetools.sae.model import SAE

_AT_ONCE = 64  # latents; their logits of the whole vocabulary are in memory


@dataclass(frozen=True)
class LatentTokens:
    """Tokens at the two ends of a latent's logit lens.

    Args:
        latent: which.
        promoted: tokens with the largest logits, largest first.
        suppressed: tokens with the smallest logits, smallest first.
        promoted_logits: logits of `promoted`.
        suppressed_logits: logits of `suppressed`.
        logits: of the whole vocabulary.
    """

    latent: int
    promoted: tuple[str, ...]
    suppressed: tuple[str, ...]
    promoted_logits: tuple[float, ...]
    suppressed_logits: tuple[float, ...]
    logits: Histogram


@torch.inference_mode()
def promoted_tokens(lm: LanguageModel, sae: SAE, latents: Sequence[int], *, n_tokens: int = 10) -> list[LatentTokens]:
    """Logit lens: the decoder rows of latents through the final norm and the head.

    It tells what a latent would say if nothing followed its layer; early latents act through later layers instead.

    Args:
        lm: the base model.
        sae: its SAE.
        latents: which latents.
        n_tokens: tokens on either side.

    Raises:
        InputError: for a latent that does not exist.
    """
    bad = [latent for latent in latents if not 0 <= latent < sae.d_sae]
    if bad:
        raise InputError("latents", expected=f"0 to {sae.d_sae - 1}", received=bad, remedy="name latents of this SAE")
    vocabulary = len(lm.tokenizer)
    weight = next(lm.final_norm.parameters(), next(lm.head.parameters()))  # a folded norm has none
    found = []
    with lm.active():
        for some in _turns(latents):
            directions = sae.W_dec[list(some)].to(weight.device, weight.dtype)
            scores = logits(lm, lm.final_norm(directions))[:, :vocabulary].float().cpu()
            n_shown = min(n_tokens, scores.shape[1])
            most, least = scores.topk(n_shown), scores.topk(n_shown, largest=False)
            for place, latent in enumerate(some):
                promoted, suppressed = (
                    tuple(lm.tokenizer.decode([token]) for token in end.indices[place].tolist())
                    for end in (most, least)
                )
                found.append(
                    LatentTokens(
                        latent,
                        promoted,
                        suppressed,
                        tuple(most.values[place].tolist()),
                        tuple(least.values[place].tolist()),
                        Histogram.of(scores[place]),
                    )
                )
    return found


def _turns(latents: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(latents), _AT_ONCE):
        yield latents[start : start + _AT_ONCE]
