"""How much a latent moves chosen tokens directly, through the final norm and the head alone.

The logit lens ranks tokens by a decoder row as if it were the whole residual; here the row is added to residuals that
the model really has before its final norm, so that effects are in logits and nats and shrink as residuals grow. What
later layers make of the latent is left out: for that, steer at the latent's own site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.activations.stream import stream_activations
from saetools.data.tokenizing import TokenizedConversation
from saetools.errors import InputError
from saetools.models.forward import logits
from saetools.models.language_model import LanguageModel
from saetools.models.site import Site
from saetools.sae.model import SAE

Unit = Literal["activation", "median_norm"]
_CHUNK = 64  # residuals whose logits exist at the same time


@dataclass(frozen=True)
class DirectEffects:
    """What adding latents does to chosen tokens, averaged over reference residuals.

    Args:
        latents: rows.
        tokens: columns, as text.
        token_ids: columns.
        logits: mean change of a token's logit.
        log_probs: mean change of its natural log-probability.
        spread: standard deviation of the latter over the residuals: large where it depends on what else they hold.
        n: residuals.
    """

    latents: tuple[int, ...]
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    logits: Float[Tensor, "latent token"]
    log_probs: Float[Tensor, "latent token"]
    spread: Float[Tensor, "latent token"]
    n: int


def final_residuals(
    lm: LanguageModel, conversations: Sequence[TokenizedConversation], *, n: int = 256, seed: int = 0
) -> Float[Tensor, "token d_model"]:
    """Residuals before the final norm, at random tokens of conversations; first positions are left out.

    Args:
        lm: the base model.
        conversations: texts on which effects are to be measured.
        n: how many; all, if there are fewer.
        seed: of their choice.

    Example:
        >>> tokens = list(tokenize([Conversation.chat("Hello")], lm.tokenizer))
        >>> final_residuals(lm, tokens, n=4).shape
        torch.Size([4, 576])
    """
    last = Site(lm.n_layers - 1)
    residuals = torch.cat([block.acts[last].cpu() for block in stream_activations(lm, [last], conversations)])
    order = torch.randperm(len(residuals), generator=torch.Generator().manual_seed(seed))
    return residuals[order[:n]]


@torch.inference_mode()
def direct_effects(
    lm: LanguageModel,
    sae: SAE,
    latents: Sequence[int],
    tokens: Sequence[str | int],
    residuals: Float[Tensor, "reference d_model"],
    *,
    amount: float = 1.0,
    unit: Unit = "activation",
) -> DirectEffects:
    """Add latents to residuals before the final norm, one at a time, and see what chosen tokens gain.

    Nothing is linearised: the norm is that of each residual with the latent in it, and logits are soft-capped where the
    model does so. An effect per unit is what a small `amount` gives, divided by it.

    Args:
        lm: the base model.
        sae: its SAE, of any layer.
        latents: which.
        tokens: as texts of one token each (mind the space before a word), or ids.
        residuals: of `final_residuals`; a few hundred.
        amount: how much is added, in units.
        unit: `activation`: the decoder row, as a latent of activation 1 writes it. `median_norm`: the row's direction
            in the length of the median residual at the SAE's site, as `steer.add` does.

    Raises:
        InputError: for a latent that does not exist, a text that is not one token, no residuals, or a unit that the SAE
            does not know.

    Example:
        >>> sae = load_sae(shipped_path("sae/smollm2-135m"))
        >>> tokens = list(tokenize([Conversation.chat("Hello")], lm.tokenizer))
        >>> effects = direct_effects(lm, sae, [6400], [" bad", " good"], final_residuals(lm, tokens), amount=5.0)
        >>> effects.logits.shape, effects.n
        (torch.Size([1, 2]), 26)
    """
    if bad := [latent for latent in latents if not 0 <= latent < sae.d_sae]:
        raise InputError("latents", expected=f"0 to {sae.d_sae - 1}", received=bad, remedy="name latents of this SAE")
    if not len(residuals):
        raise InputError("residuals", expected="one or more", received="none", remedy="pass longer conversations")
    ids = torch.tensor([_token_id(lm, token) for token in tokens], device=lm.device)
    added = amount * _directions(sae, unit)[torch.tensor(list(latents), dtype=torch.long)].to(lm.device)
    before = _scores(lm, residuals.to(lm.device), ids)
    changes = [_scores(lm, residuals.to(lm.device) + row, ids) - before for row in added.to(residuals.dtype)]
    change = torch.stack(changes) if changes else before.new_zeros(0, *before.shape)
    mean = change.mean(1).cpu()
    return DirectEffects(
        latents=tuple(latents),
        tokens=tuple(lm.tokenizer.decode([token]) for token in ids.tolist()),
        token_ids=tuple(ids.tolist()),
        logits=mean[..., 0],
        log_probs=mean[..., 1],
        spread=change[..., 1].std(1, correction=0).cpu(),
        n=len(residuals),
    )


def _scores(
    lm: LanguageModel, residuals: Float[Tensor, "reference d_model"], ids: Int[Tensor, " token"]
) -> Float[Tensor, "reference token 2"]:
    """Logit and log-probability of chosen tokens after each residual."""
    weight = next(lm.final_norm.parameters(), next(lm.head.parameters()))  # a folded norm has none
    found = []
    with lm.active():
        for some in torch.split(residuals, _CHUNK):
            scores = logits(lm, lm.final_norm(some.to(weight.device, weight.dtype))).float()
            chosen = scores[:, ids]
            found.append(torch.stack([chosen, chosen - scores.logsumexp(-1, keepdim=True)], dim=-1))
    return torch.cat(found)


def _directions(sae: SAE, unit: Unit) -> Float[Tensor, "d_sae d_out"]:
    if unit not in get_args(Unit):
        raise InputError("unit", expected=" or ".join(get_args(Unit)), received=repr(unit), remedy="pick one")
    if unit == "activation":
        if sae.input_norm != "none":
            raise InputError(
                "unit",
                expected="median_norm, for an SAE whose activations have no fixed size in the residual stream",
                received=f"activation, with input_norm {sae.input_norm!r}",
                remedy="pass unit='median_norm'",
            )
        return sae.W_dec.detach()
    if sae.metadata.median_norm is None:
        raise InputError(
            "unit",
            expected="an SAE that knows the median norm at its site",
            received="one that does not",
            remedy="use saetools.latents.with_statistics, or unit='activation'",
        )
    return sae.directions() * sae.metadata.median_norm


def _token_id(lm: LanguageModel, token: str | int) -> int:
    if isinstance(token, int):
        if not 0 <= token < len(lm.tokenizer):
            raise InputError(
                "tokens", expected=f"ids from 0 to {len(lm.tokenizer) - 1}", received=token, remedy="pick another"
            )
        return token
    ids: list[int] = lm.tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = [lm.tokenizer.decode([one]) for one in ids]
        raise InputError(
            "tokens",
            expected="texts of one token each",
            received=f"{token!r}, which is {pieces}",
            remedy="name one of these, often with a space before the word",
        )
    return ids[0]
