"""What an SAE keeps of a model: variance, and the model's own predictions with the reconstruction spliced in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.data.conversation import Conversation
from saetools.data.tokenizing import Batch, TokenizeReport, make_batches, tokenize
from saetools.diff import sae_site
from saetools.errors import InputError
from saetools.models.editing import Edit, Edits, Where, edit
from saetools.models.forward import final_hidden, logits, read
from saetools.models.language_model import LanguageModel
from saetools.models.replay import LayerReplay
from saetools.models.site import Site
from saetools.sae.model import SAE
from saetools.steer import placed

_CHUNK = 256  # tokens whose logits exist twice at the same time


@dataclass(frozen=True)
class Fidelity:
    """Fidelity of an SAE on a model; first positions and padding do not count.

    Args:
        fvu: fraction of variance unexplained, sum ||x - x'||^2 / sum ||x - mean||^2.
        l0: mean active latents a token.
        dead: share of latents that fired on no counted token.
        ce_clean: cross-entropy of the model, nats a token.
        ce_sae: the same with the reconstruction in place of the residual.
        ce_zero: the same with zeros in its place.
        ce_recovered: (ce_zero - ce_sae) / (ce_zero - ce_clean).
        kl: mean KL(clean || spliced), nats a token.
        n_tokens: tokens that fvu, l0 and dead count.
        n_predictions: tokens that cross-entropies and KL count.
        n_truncated: conversations that were cut.
    """

    fvu: float
    l0: float
    dead: float
    ce_clean: float
    ce_sae: float
    ce_zero: float
    ce_recovered: float
    kl: float
    n_tokens: int
    n_predictions: int
    n_truncated: int


@torch.inference_mode()
def measure_fidelity(
    lm: LanguageModel,
    sae: SAE,
    conversations: Sequence[Conversation],
    *,
    site: Site | None = None,
    max_tokens: int | None = 256,
    batch_tokens: int = 2048,
    on_progress: Callable[[int], None] | None = None,
) -> Fidelity:
    """Measure an SAE on conversations or texts.

    Args:
        lm: the model, base or tuned.
        sae: the SAE.
        conversations: what to read.
        site: where the SAE reads; by default what its metadata says.
        max_tokens: longer conversations are cut, and counted.
        batch_tokens: padded tokens of a forward pass.
        on_progress: called with tokens done.

    Raises:
        InputError: if there is nothing to predict, or no site is known.
    """
    site = site or sae_site(sae)
    report = TokenizeReport()
    tokenized = list(tokenize(conversations, lm.tokenizer, max_tokens=max_tokens, report=report))
    moments = _Moments(sae.d_in, sae.d_sae)
    totals = torch.zeros(4, dtype=torch.double)  # nll clean, nll spliced, nll zero, KL
    n_predictions = 0
    with lm.active():
        for batch in make_batches(tokenized, batch_tokens=batch_tokens):
            replay = LayerReplay(lm, site)
            with replay.over(lm, batch.token_ids, batch.mask):
                acts = read(lm, batch.token_ids.to(lm.device), batch.mask.to(lm.device), [site])[site]
            moments.add(sae, acts[batch.counted().to(acts.device)])
            sums, n = _prediction_sums(lm, sae, site, batch, replay)
            totals += sums
            n_predictions += n
            if on_progress is not None:
                on_progress(moments.n)
    if not n_predictions:
        raise InputError("conversations", expected="tokens to predict", received="none", remedy="pass longer texts")
    ce_clean, ce_sae, ce_zero, kl = (totals / n_predictions).tolist()
    return Fidelity(
        fvu=moments.fvu(),
        l0=moments.active / moments.n,
        dead=float((moments.fired == 0).float().mean()),
        ce_clean=ce_clean,
        ce_sae=ce_sae,
        ce_zero=ce_zero,
        ce_recovered=(ce_zero - ce_sae) / (ce_zero - ce_clean),
        kl=kl,
        n_tokens=moments.n,
        n_predictions=n_predictions,
        n_truncated=report.n_truncated,
    )


def splice(sae: SAE) -> Edit:
    """Replace the residual stream by its reconstruction, first positions apart."""

    def fn(acts: Tensor, where: Where) -> Tensor:
        chosen = where.mask & (where.positions > 0)
        recon = placed(sae, acts.device)(acts[chosen])
        return acts.masked_scatter(chosen[..., None], recon.to(acts.dtype))

    return fn


def _zero(acts: Tensor, where: Where) -> Tensor:
    chosen = where.mask & (where.positions > 0)
    return acts.masked_fill(chosen[..., None], 0.0)


class _Moments:
    """Sums for FVU (in float64: mean and variance in one pass), L0 and dead latents."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        self.n = self.active = 0
        self.squared = self.error = 0.0
        self.sum = torch.zeros(d_in, dtype=torch.double)
        self.fired = torch.zeros(d_sae)

    def add(self, sae: SAE, acts: Float[Tensor, "token d_in"]) -> None:
        acts = acts.to(sae.W_dec.device)
        latents = sae.encode(acts)
        x = acts.double()
        self.error += float((x - sae.decode(latents, acts).double()).square().sum())
        self.squared += float(x.square().sum())
        self.sum += x.sum(0).cpu()
        self.active += int((latents.values != 0).sum())
        self.fired += latents.counts().float().cpu()
        self.n += len(x)

    def fvu(self) -> float:
        return self.error / (self.squared - float(self.sum.square().sum()) / self.n)


def _prediction_sums(
    lm: LanguageModel, sae: SAE, site: Site, batch: Batch, replay: LayerReplay
) -> tuple[Float[Tensor, " 4"], int]:
    """Summed negative log-probabilities (clean, spliced, zero) and KL over the batch's predicted tokens."""
    scored = batch.counted()
    targets = batch.token_ids[scored].to(lm.device)

    def run(edits: Edits) -> Tensor:
        with edit(lm, edits), replay.over(lm, batch.token_ids, batch.mask):
            hidden = final_hidden(lm, batch.token_ids.to(lm.device), batch.mask.to(lm.device))
        return hidden[:, :-1][scored[:, 1:].to(hidden.device)]

    clean, spliced, zero = run({}), run({site: splice(sae)}), run({site: _zero})
    sums = torch.zeros(4, dtype=torch.double)
    for start in range(0, len(targets), _CHUNK):
        part = slice(start, start + _CHUNK)
        log_p, log_q, log_z = (torch.log_softmax(logits(lm, h[part]).float(), -1) for h in (clean, spliced, zero))
        for index, scores in enumerate((log_p, log_q, log_z)):
            sums[index] -= scores.gather(1, targets[part, None]).double().sum().cpu()
        sums[3] += (log_p.exp() * (log_p - log_q)).double().sum().cpu()
    return sums, len(targets)
