"""Causal certificates: does steering along a latent wake the behaviour in the base, and against it calm the organism?

The second half of arXiv 2506.19823's recipe. A diff ranks what changed; most of that is consequence or bystander. Here
each candidate is added to the base and subtracted from the tuned model, at strengths up to where answers stay
coherent, and has to move the behaviour score further than three random controls do. The score is the judge-free forced
choice: any damage to a model widens its gaps, hence the controls. It says nothing about strengths beyond the coherent
ones, or about behaviour that the items do not ask for.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.data.conversation import Conversation
from saetools.data.shipped import ForcedChoiceItem
from saetools.errors import InputError, SaetoolsWarning
from saetools.evaluate.bench import SIDES, Bench, BudgetSpentError, Side
from saetools.evaluate.certificate import Candidate, Certificate, Certification, Effect, verdict_of
from saetools.evaluate.certificate_config import CertificateConfig
from saetools.evaluate.coherence import Judge
from saetools.models.language_model import LanguageModel
from saetools.models.load import check_pair
from saetools.models.site import Site
from saetools.sae.identity import sae_site
from saetools.sae.model import SAE
from saetools.significance import false_discovery_rates
from saetools.stats import estimate_mean

_RESULT = "certification.json"
_LEAST_JUDGED = 0.9  # share of answers, where a judge is asked


def certify_latents(
    base: LanguageModel,
    tuned: LanguageModel,
    sae: SAE,
    candidates: Sequence[Candidate | int],
    items: Sequence[ForcedChoiceItem],
    prompts: Sequence[Conversation | str],
    texts: Sequence[str],
    *,
    rates: Float[Tensor, " d_sae"],
    changes: Float[Tensor, " d_sae"] | None = None,
    site: Site | None = None,
    config: CertificateConfig = CertificateConfig(),
    judge: Judge | None = None,
    cautions: Sequence[str] = (),
    out: str | Path | None = None,
    shared: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Certification:
    """Find out which candidates cause the organism's behaviour, and how much of it.

    Each is steered over all strengths on both models; the answers of a round of candidates at all strengths are one
    batched generation. The largest strength with coherent answers is searched; there, the score has to beat the
    unedited model, random directions of equal norm, random latents, and random directions of equal perplexity: their
    means, and what one more draw of them may do. An effect holds if the largest of these one-sided p-values over items
    (`significance.mean_p_values`, `significance.draw_p_value`) passes Benjamini and Hochberg's rule over all candidates
    and both models, and if it makes up a share of the organism's shift that counts (where the organism has one). The
    strength is chosen by coherence alone, which favours no verdict.

    Args:
        base: the model before the fine-tune.
        tuned: the organism.
        sae: an SAE of the base with a median residual norm.
        candidates: latents, or named sets; choose them on other data than `items`.
        items: forced-choice items for the behaviour score.
        prompts: what is answered to see coherence; at least ten tell shares of 10 %.
        texts: neutral texts, for perplexity under edits.
        rates: firing rate of every latent, by which controls are matched, such as the mean of a diff's `rate_base` and
            `rate_tuned` (`LatentDiff.rates`).
        changes: mean change of every latent from base to organism, such as the `delta` of a diff at `response`, where
            the items are scored, for the share of the organism's shift that this change itself carries.
        site: where the SAE reads; by default what its metadata says.
        config: settings.
        judge: scores coherence of answers, for instance through an endpoint.
        cautions: what the diff that candidates come from warns of; kept among the warnings of the result.
        out: folder for `base.jsonl` and `tuned.jsonl`, from which a run that was killed or ran out of budget goes on,
            and `certification.json`, the result.
        shared: folder for `base.jsonl` instead: other organisms of the same base need not measure it again.
        on_progress: called with measurements done and in all, those that turn out unneeded included.

    Raises:
        InputError: for candidates, data or settings that do not go together, or a folder of another run.

    Example:
        >>> from saetools.planted import plant_model
        >>> planted = plant_model()
        >>> texts = [prompt.messages[0].content for prompt in planted.prompts]
        >>> models, data = (planted.base, planted.tuned, planted.sae), (planted.items, planted.prompts, texts)
        >>> config = CertificateConfig(strengths=(0.1,), n_refine=0, max_new_tokens=4)
        >>> candidates = [planted.persona[0], planted.correlates[0]]
        >>> found = certify_latents(*models, candidates, *data, rates=torch.ones(384), config=config)
        >>> [one.verdict for one in found.certificates]
        ['induces', 'neither']
    """
    site = site or sae_site(sae)
    chosen = _checked(base, tuned, sae, candidates, items, prompts, texts, rates, changes)
    given = (base, tuned, sae, site, items, prompts, texts, rates, changes, chosen, config)
    bench = Bench(*given, judge, out, shared, on_progress)
    gaps = bench.unedited()
    measured: dict[str, dict[Side, Effect]] = {}
    said: list[str] = []
    try:
        for start in range(0, len(chosen), config.round_size):
            some = chosen[start : start + config.round_size]
            answers = {side: bench.search(side, some) for side in SIDES}
            for one in some:
                measured[one.name] = {side: bench.effect(side, one, answers[side][one.key]) for side in SIDES}
    except BudgetSpentError:
        said.append(f"the budget is spent: {len(chosen) - len(measured)} of {len(chosen)} candidates are untested")
    shift = estimate_mean(gaps["tuned"] - gaps["base"], seed=config.seed)
    shifted = shift.low > 0
    if not shifted:
        said.append(f"the organism does not score above its base on these items ({shift}): shares mean nothing")
    if judge is not None:
        said += _unjudged(measured.values())
    for text in said:
        warnings.warn(text, SaetoolsWarning, 2)
    found = Certification(
        certificates=tuple(_with_rates(chosen, measured, config, shifted=shifted)),
        base=estimate_mean(gaps["base"], seed=config.seed),
        tuned=estimate_mean(gaps["tuned"], seed=config.seed),
        shift=shift,
        warnings=(*cautions, *said),
        settings=bench.settings,
        provenance=bench.provenance,
    )
    if out is not None:
        found.save(Path(out) / _RESULT)
    return found


def _unjudged(measured: Iterable[Mapping[Side, Effect]]) -> list[str]:
    """A warning where the judge left many answers without a score."""
    doses = [dose for effects in measured for effect in effects.values() for dose in effect.doses]
    n, n_judged = sum(dose.n_answers for dose in doses), sum(dose.n_judged for dose in doses)
    if n_judged >= _LEAST_JUDGED * n:
        return []
    return [f"the judge gave {n_judged} of {n} answers a score: coherence of the others was measured without it"]


def _with_rates(
    candidates: Sequence[Candidate],
    measured: Mapping[str, Mapping[Side, Effect]],
    config: CertificateConfig,
    *,
    shifted: bool,
) -> list[Certificate]:
    """Certificates with false discovery rates over all effects of a coherent strength."""
    keys = [(one, side) for one in measured for side in SIDES if measured[one][side].strength]
    p_values = torch.tensor([measured[name][side].p_value for name, side in keys], dtype=torch.double)
    q_values = dict(zip(keys, false_discovery_rates(p_values).tolist(), strict=True))
    certificates = []
    for one in candidates:
        if one.name not in measured:
            certificates.append(Certificate(one, None, None, "untested"))
            continue
        effects = []
        for side in SIDES:
            effect, q_value = measured[one.name][side], q_values.get((one.name, side), math.nan)
            matters = effect.share is not None and (not shifted or effect.share.low >= config.min_share)
            effects.append(dataclasses.replace(effect, q_value=q_value, holds=q_value <= config.fdr and matters))
        induces, suppresses = effects
        certificates.append(Certificate(one, induces, suppresses, verdict_of(induces, suppresses)))
    return certificates


def _checked(
    base: LanguageModel,
    tuned: LanguageModel,
    sae: SAE,
    candidates: Sequence[Candidate | int],
    items: Sequence[ForcedChoiceItem],
    prompts: Sequence[Conversation | str],
    texts: Sequence[str],
    rates: Tensor,
    changes: Tensor | None,
) -> list[Candidate]:
    """The candidates with names, once everything fits."""
    check_pair(base, tuned, ())
    chosen = [Candidate(f"latent {one}", (one,)) if isinstance(one, int) else one for one in candidates]
    bad = [latent for one in chosen for latent in one.latents if not 0 <= latent < sae.d_sae]
    names = [one.name for one in chosen]
    if bad or not chosen or len(set(names)) < len(names):
        raise InputError(
            "candidates",
            expected=f"latents of 0 to {sae.d_sae - 1}, each name once",
            received=bad or names,
            remedy="choose latents of this SAE",
        )
    width = f"one for each of {sae.d_sae} latents"
    for name, received, enough, expected in (
        ("items", len(items), len(items) >= 4, "four or more"),
        ("prompts", len(prompts), len(prompts) >= 1, "one or more"),
        ("texts", len(texts), len(texts) >= 1, "one or more"),
        ("rates", len(rates), len(rates) == sae.d_sae, width),
        ("changes", 0 if changes is None else len(changes), changes is None or len(changes) == sae.d_sae, width),
    ):
        if not enough:
            raise InputError(name, expected=expected, received=received, remedy="pass others")
    return chosen
