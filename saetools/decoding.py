"""Rows that a model answers together, one token at a time; rows join and leave, and each has edits of its own.

What `generate` and the server run on. A row's answer is the one that it would get alone: its random stream, its edits
and its place do not depend on its neighbours. One thread at a time may use a model's lanes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saetools.data.roles import Role
from saetools.data.tokenizing import TokenizedConversation, pad
from saetools.models.editing import Edits, edit
from saetools.models.forward import final_hidden, logits
from saetools.models.language_model import LanguageModel
from saetools.models.site import Site
from saetools.models.where import Edit, Where
from saetools.row_edits import combine_rows


@dataclass(eq=False)
class Row:
    """One answer as it grows.

    Args:
        prompt: what is answered, with the tokens that open the answer.
        edits: its edits, `None` for none.
        stream: its random numbers; one is drawn for every token, if the temperature is above 0.
        max_new_tokens: length at which it ends.
        temperature: 0 takes the most likely token.
        top_p: draw from the smallest set of tokens with so much probability.
        n_top: how many of the likeliest tokens to keep with their log-probabilities, at every place; `None` for none.
        token_ids: the answer so far, with the token that ended it.
        finished: whether it ended by itself.
        broken: whether the model's output for it is not finite; it then gets no more tokens.
        log_probs: of the tokens of the answer, under the edited model at temperature 1; where `n_top` is not `None`.
        top: the most likely tokens at each place, with their log-probabilities.
    """

    prompt: TokenizedConversation
    edits: Edits | None
    stream: torch.Generator
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    n_top: int | None = None
    token_ids: list[int] = field(default_factory=list)
    finished: bool = False
    broken: bool = False
    log_probs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether it gets no more tokens."""
        return self.finished or self.broken or len(self.token_ids) >= self.max_new_tokens

    @property
    def answer_ids(self) -> list[int]:
        """The answer so far, without the token that ended it."""
        return self.token_ids[: len(self.token_ids) - self.finished]


class Lane:
    """Rows of one view of a model, with their cache.

    Args:
        lm: the view; a Hugging Face model.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self.rows: list[Row] = []
        self._lm = lm
        self._ends = end_tokens(lm)
        self._cache: Any = None
        self._mask: Bool[Tensor, "row past"] = torch.ones(0, 0, dtype=torch.bool, device=lm.device)
        self._edits: dict[Site, list[Edit]] = {}

    @torch.inference_mode()
    def admit(self, rows: Sequence[Row]) -> None:
        """Read the prompts of new rows, and give each its first token."""
        from transformers import DynamicCache

        batch = pad([row.prompt for row in rows], range(len(rows)), pad_left=True)
        token_ids, mask = batch.token_ids.to(self._lm.device), batch.mask.to(self._lm.device)
        cache = DynamicCache()  # whole contexts also where layers look back a little: their masks see to it
        edits = combine_rows([row.edits for row in rows])
        with self._lm.active():
            with edit(self._lm, edits, roles=batch.roles):
                hidden = final_hidden(self._lm, token_ids, mask, cache=cache)[:, -1]
            scores = logits(self._lm, hidden).float()
        everyone = [*self.rows, *rows]
        all_edits = combine_rows([row.edits for row in everyone])
        if self.rows:
            width = max(mask.shape[1], self._mask.shape[1])
            cache, mask = merged([self._cache, cache]), torch.cat([_padded(self._mask, width), _padded(mask, width)])
        choose(rows, scores, self._ends)  # nothing has changed before
        self.rows, self._cache, self._mask, self._edits = everyone, cache, mask, all_edits

    @torch.inference_mode()
    def step(self) -> None:
        """Give every row that is not done one more token."""
        n_rows, device = len(self.rows), self._lm.device
        last = torch.tensor([(row.token_ids or [0])[-1] for row in self.rows], device=device)[:, None]
        mask = torch.cat([self._mask, self._mask.new_ones(n_rows, 1)], 1)
        steps = torch.tensor([len(row.token_ids) for row in self.rows], device=device)[:, None]
        roles = torch.full((n_rows, 1), int(Role.RESPONSE), dtype=torch.uint8, device=device)

        def known(fn: Edit) -> Edit:
            def run(acts: Tensor, where: Where) -> Tensor:
                return fn(acts, replace(where, roles=roles.to(acts.device), steps=steps.to(acts.device)))

            return run

        edits = {site: [known(fn) for fn in fns] for site, fns in self._edits.items()}
        going = [number for number, row in enumerate(self.rows) if not row.is_done]
        with self._lm.active():
            with edit(self._lm, edits):
                hidden = final_hidden(self._lm, last, mask, cache=self._cache)[:, -1]
            scores = logits(self._lm, hidden if len(going) == n_rows else hidden[going]).float()
        self._mask = mask
        choose([self.rows[number] for number in going], scores, self._ends)

    def drop(self, rows: Collection[Row]) -> None:
        """Let rows go."""
        kept = [number for number, row in enumerate(self.rows) if row not in rows]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[number] for number in kept]
        if not kept:
            self._cache, self._mask, self._edits = None, self._mask[:0, :0], {}
            return
        index = torch.tensor(kept, device=self._lm.device)
        mask = self._mask[index]
        empty = int((mask.cumsum(1) == 0).all(0).sum())  # columns of padding alone
        self._mask = mask[:, empty:]
        self._cache = selected(self._cache, index, empty)
        self._edits = combine_rows([row.edits for row in self.rows])


def choose(rows: Sequence[Row], scores: Float[Tensor, "row vocab"], ends: Collection[int]) -> None:
    """Give every row its next token.

    Args:
        rows: none of which is done.
        scores: logits for each.
        ends: tokens that end an answer.
    """
    for row, is_finite in zip(rows, torch.isfinite(scores.sum(1)).tolist(), strict=True):
        row.broken = not is_finite
    able = [(number, row) for number, row in enumerate(rows) if not row.broken]
    for settings in {(row.temperature, row.top_p) for _, row in able}:
        own = [number for number, row in able if (row.temperature, row.top_p) == settings]
        some = scores if len(own) == len(rows) else scores[own]
        tokens = choose_tokens(some, *settings, [rows[number].stream for number in own]).tolist()
        for number, token in zip(own, tokens, strict=True):
            row = rows[number]
            row.token_ids.append(token)
            row.finished = token in ends
            if row.n_top is not None:
                _keep_log_probs(row, scores[number], row.n_top)


def end_tokens(lm: LanguageModel) -> set[int]:
    """Ids of the tokens that end an answer."""
    settings = getattr(lm.model, "generation_config", None)
    configured = getattr(settings, "eos_token_id", None)
    ids = set(configured) if isinstance(configured, list) else {configured}
    return {token for token in ids | {lm.tokenizer.eos_token_id} if token is not None}


def choose_tokens(
    scores: Float[Tensor, "row vocab"], temperature: float, top_p: float, streams: Sequence[torch.Generator]
) -> Int[Tensor, " row"]:
    """One token a row: by inverting the cumulative distribution at one uniform number of the row's own stream."""
    if temperature == 0:
        return scores.argmax(-1)
    probs = torch.softmax(scores.double() / temperature, dim=-1)
    uniform = torch.stack([torch.rand((), generator=stream, dtype=torch.double) for stream in streams]).to(probs.device)
    if top_p >= 1:
        cumulative = probs.cumsum(-1)
        return (
            torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:])
            .squeeze(1)
            .clamp_(max=probs.shape[1] - 1)
        )
    ordered, tokens = probs.sort(-1, descending=True)
    cumulative = ordered.cumsum(-1)
    kept = torch.where(cumulative - ordered < top_p, ordered, 0.0).cumsum(-1)
    place = torch.searchsorted(kept, uniform[:, None] * kept[:, -1:]).clamp_(max=probs.shape[1] - 1)
    return tokens.gather(1, place).squeeze(1)


def merged(caches: Sequence[Any]) -> Any:
    """Caches of some rows and of others as one, padded on the left."""
    from transformers import DynamicCache

    if len(caches) == 1:
        return caches[0]
    out = DynamicCache()
    width = max(cache.get_seq_length() for cache in caches)
    for index in range(len(caches[0].layers)):
        layers = [cache.layers[index] for cache in caches]
        keys, values = (
            torch.cat([_padded(getattr(layer, name), width, dim=-2) for layer in layers]) for name in ("keys", "values")
        )
        out.update(keys, values, index)
    return out


def selected(cache: Any, rows: Int[Tensor, " row"], start: int) -> Any:
    """Some rows of a cache, from a column on."""
    from transformers import DynamicCache

    out = DynamicCache()
    for index, layer in enumerate(cache.layers):
        out.update(layer.keys[rows, :, start:], layer.values[rows, :, start:], index)
    return out


def _padded(tensor: Tensor, width: int, *, dim: int = -1) -> Tensor:
    """With zeros on the left."""
    missing = width - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim)


def _keep_log_probs(row: Row, scores: Float[Tensor, " vocab"], n_top: int) -> None:
    log_probs = scores.log_softmax(-1)
    row.log_probs.append(float(log_probs[row.token_ids[-1]]))
    values, tokens = log_probs.topk(min(n_top, len(log_probs)))
    row.top.append([(token, value) for token, value in zip(tokens.tolist(), values.tolist(), strict=True)])
