"""What a model predicts with something else in place of its residual stream: a reconstruction, a mean, zeros."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saetools.data.tokenizing import Batch
from saetools.models.editing import Edits, edit
from saetools.models.forward import final_hidden, logits
from saetools.models.language_model import LanguageModel
from saetools.models.replay import LayerReplay
from saetools.models.where import Edit, Where
from saetools.sae.model import SAE
from saetools.steer.scope import Scope
from saetools.steer.seen import placed

_CHUNK = 256  # tokens whose logits exist three times at the same time


def splice(sae: SAE, *, skip_first: bool = True) -> Edit:
    """Replace the residual stream by its reconstruction, first positions apart unless `skip_first=False`."""
    scope = Scope(skip_first=skip_first)

    def fn(acts: Tensor, where: Where) -> Tensor:
        chosen = scope(where)
        recon = placed(sae, acts.device)(acts[chosen])
        return acts.masked_scatter(chosen[..., None], recon.to(acts.dtype))

    return fn


def fill(vector: Float[Tensor, " d_model"], *, skip_first: bool = True) -> Edit:
    """Replace the residual stream by one vector, first positions apart unless `skip_first=False`."""
    scope = Scope(skip_first=skip_first)
    return lambda acts, where: torch.where(scope(where)[..., None], vector.to(acts), acts)


def compare_predictions(
    lm: LanguageModel,
    batch: Batch,
    at: Bool[Tensor, "row pos"],
    edits: Mapping[str, Edits],
    replay: LayerReplay,
) -> dict[str, Float[Tensor, " token"]]:
    """How well a model predicts the next token, as it is and under each of several edits, and how far they diverge.

    Args:
        lm: the model.
        batch: what it reads.
        at: the positions from which it predicts.
        edits: by name, at the replay's site or after it.
        replay: what layers below the edits computed before.

    Returns:
        For every position, on the CPU: `predictions`: 1 if there is a next token, else 0; its cross-entropy (0 without
        one) `ce_clean`, and `ce_NAME` of each edit; `kl_NAME`, KL(clean || edited). In nats.
    """
    hidden = {}
    for name, some in {"clean": {}, **edits}.items():
        with edit(lm, some), replay.over(lm, batch.token_ids, batch.mask):
            states = final_hidden(lm, batch.token_ids.to(lm.device), batch.mask.to(lm.device))
        hidden[name] = states[at.to(states.device)]
    has_next = torch.nn.functional.pad(batch.mask[:, 1:], (0, 1))[at].double()
    following = batch.token_ids.roll(-1, 1)[at][:, None].to(lm.device)
    ce: dict[str, list[Tensor]] = {name: [] for name in hidden}
    kl: dict[str, list[Tensor]] = {name: [] for name in edits}
    for start in range(0, len(following), _CHUNK):
        part = slice(start, start + _CHUNK)
        scores = clean = torch.log_softmax(logits(lm, hidden["clean"][part]).float(), -1)
        for name, states in hidden.items():
            if name != "clean":
                scores = torch.log_softmax(logits(lm, states[part]).float(), -1)
                kl[name].append((clean.exp() * (clean - scores)).sum(-1))
            ce[name].append(-scores.gather(1, following[part].to(scores.device))[:, 0])
    return {
        "predictions": has_next,
        **{f"ce_{name}": torch.cat(parts).double().cpu() * has_next for name, parts in ce.items()},
        **{f"kl_{name}": torch.cat(parts).double().cpu() for name, parts in kl.items()},
    }
