"""What a latent is about: the tokens that its direction promotes and suppresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from saetools.errors import InputError
from saetools.models.forward import logits
from saetools.models.language_model import LanguageModel
from saetools.sae.model import SAE


@dataclass(frozen=True)
class LatentTokens:
    """Tokens at the two ends of a latent's logit lens, strongest first."""

    latent: int
    promoted: tuple[str, ...]
    suppressed: tuple[str, ...]


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
        for latent in latents:
            direction = sae.W_dec[latent].to(weight.device, weight.dtype)
            scores = logits(lm, lm.final_norm(direction[None]))[0, :vocabulary].float()
            n_shown = min(n_tokens, len(scores))
            ends = [scores.topk(n_shown).indices, (-scores).topk(n_shown).indices]
            promoted, suppressed = (tuple(lm.tokenizer.decode([token]) for token in end.tolist()) for end in ends)
            found.append(LatentTokens(latent, promoted, suppressed))
    return found
