"""Which latents fire on a sentence, in the base model against its fine-tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from saetools.activations.stream import stream_activations
from saetools.data.conversation import Conversation
from saetools.data.roles import select_positions
from saetools.data.tokenizing import tokenize
from saetools.errors import InputError
from saetools.models.language_model import LanguageModel
from saetools.models.load import check_pair
from saetools.models.site import Site
from saetools.sae.identity import sae_site
from saetools.sae.model import SAE
from saetools.sae.sparse import SparseLatents

Over = Literal["max", "mean"]
Order = Literal["value", "increase", "decrease"]


@dataclass(frozen=True)
class TextHit:
    """A latent that fires on a text.

    Args:
        latent: which.
        values: over the tokens, by model.
        acts: at each token, by model.
    """

    latent: int
    values: dict[str, float]
    acts: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class TextSearch:
    """Latents that fire on a text, first those that were sought.

    Args:
        tokens: of the text, as text; the first, an attention sink, is left out.
        hits: latents.
        n_active: latents that fire in any of the models.
    """

    tokens: tuple[str, ...]
    hits: tuple[TextHit, ...]
    n_active: int


def search_text(
    models: Mapping[str, LanguageModel],
    sae: SAE,
    text: str | Conversation,
    *,
    over: Over = "max",
    order: Order = "value",
    n: int = 20,
    site: Site | None = None,
) -> TextSearch:
    """Latents that fire on a sentence or a conversation.

    Args:
        models: by the names that results have: a base model, or base and fine-tune in this order.
        sae: an SAE of the base model.
        text: a plain text, or a conversation, which is read with the chat template.
        over: whether a latent's value is the largest of its activations or their mean.
        order: by `value` in the last of the models, or by how much it is above (`increase`) or below (`decrease`) that
            in the first.
        n: most latents to list.
        site: where the SAE reads; by default what its metadata says.

    Raises:
        InputError: for models that cannot be compared, a comparison of one model, or a text of one token.

    Example:
        >>> sae = load_sae(shipped_path("sae/smollm2-135m"))
        >>> found = search_text({"base": lm}, sae, "The cat sat on the mat.", n=3)
        >>> len(found.hits), found.tokens
        (3, (' cat', ' sat', ' on', ' the', ' mat', '.'))
    """
    for name, value, known in (("over", over, get_args(Over)), ("order", order, get_args(Order))):
        if value not in known:
            raise InputError(name, expected="one of " + ", ".join(known), received=repr(value), remedy="pick one")
    names = list(models)
    if len(names) not in ((1, 2) if order == "value" else (2,)):
        raise InputError(
            "models",
            expected="one or two models" if order == "value" else f"two models to order by {order}",
            received=len(names),
            remedy="pass {'base': ..., 'tuned': ...}",
        )
    conversation = Conversation(text=text) if isinstance(text, str) else text
    first, last = models[names[0]], models[names[-1]]
    (tokenized,) = tokenize([conversation], first.tokenizer)
    if first is not last:
        check_pair(first, last, [first.tokenizer.decode(tokenized.token_ids)])
    if len(tokenized) < 2:
        raise InputError("text", expected="two tokens or more", received=len(tokenized), remedy="pass a longer text")
    found: dict[str, SparseLatents] = {}
    for name, lm in models.items():
        (block,) = stream_activations(lm, [site or sae_site(sae)], [tokenized])
        (acts,) = block.acts.values()
        found[name] = sae.encode(acts.to(sae.W_dec.device))
    active = torch.unique(torch.cat([latents.indices[latents.values != 0] for latents in found.values()]))
    columns = {name: latents.of(active).float().cpu() for name, latents in found.items()}
    values = {name: acts.amax(0) if over == "max" else acts.mean(0) for name, acts in columns.items()}
    rank = values[names[-1]] - (0 if order == "value" else values[names[0]])
    hits = tuple(
        TextHit(
            int(active[place]),
            {name: float(value[place]) for name, value in values.items()},
            {name: tuple(acts[:, place].tolist()) for name, acts in columns.items()},
        )
        for place in rank.argsort(descending=order != "decrease", stable=True)[:n].tolist()
    )
    tokens = tuple(first.tokenizer.decode([token]) for token in block.token_ids.tolist())
    return TextSearch(tokens, hits, len(active))


@torch.inference_mode()
def acts_on(
    lm: LanguageModel, sae: SAE, conversation: Conversation, latents: Sequence[int], *, site: Site | None = None
) -> list[tuple[str, float]]:
    """The tokens of a conversation's final answer, and the sum of some latents' activations on each.

    Args:
        lm: the model that reads it.
        sae: whose latents.
        conversation: ends with an answer.
        latents: which.
        site: where the SAE reads; by default what its metadata says.
    """
    (tokenized,) = tokenize([conversation], lm.tokenizer)
    (block,) = stream_activations(lm, [site or sae_site(sae)], [tokenized])
    (acts,) = block.acts.values()
    answer = select_positions(block.roles, "response")
    chosen = torch.tensor(list(latents), device=sae.W_dec.device)
    total = sae.encode(acts[answer].to(sae.W_dec.device)).of(chosen).float().sum(1).tolist()
    tokens = block.token_ids[answer].tolist()
    return [(str(lm.tokenizer.decode([token])), act) for token, act in zip(tokens, total, strict=True)]
