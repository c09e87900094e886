"""What latents are about, in words: a language model proposes, and is then scored on what it has not seen.

It is shown passages in which a latent fires, and writes a sentence. With the sentence alone it then has to find, among
held-out passages, those in which the latent fires (detection), and to tell marks at the firing tokens from marks
elsewhere (fuzzing); after EleutherAI's automated interpretability (arXiv 2410.13928). A good score says that the
sentence predicts where the latent fires, on texts like these. It does not say what the latent does: for that, steer.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from saetools.endpoint import Budget, BudgetSpentError, Endpoint, Spending
from saetools.errors import InputError, SaetoolsWarning
from saetools.interpret.asking import Ask, answering, describe
from saetools.interpret.evidence import Evidence, LatentPassages, evidence_sha256, split_evidence
from saetools.interpret.explaining import ExplainConfig, Outcome, explain_evidence
from saetools.interpret.explanation import CHANCE, Explanation, ExplanationLog, Failure
from saetools.models.language_model import LanguageModel
from saetools.provenance import versions


@dataclass(frozen=True)
class ExplanationRun:
    """What came of explaining some latents.

    Args:
        explanations: of the latents that were finished, now or before, in the order asked for.
        unfinished: latents that the budget did not suffice for.
        n_requests: that this run sent, retries included.
        n_tokens: of prompts and answers in this run, as far as the server reported them.
    """

    explanations: tuple[Explanation, ...]
    unfinished: tuple[int, ...]
    n_requests: int
    n_tokens: int


def explain_latents(
    latents: Sequence[int],
    passages: Callable[[int], LatentPassages],
    explainer: Endpoint | LanguageModel,
    *,
    acts_of: str | None = None,
    config: ExplainConfig = ExplainConfig(),
    log: str | Path | None = None,
    budget: Budget | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ExplanationRun:
    """Explain latents, and score the explanations on held-out passages.

    Answers that do not come or cannot be read are asked for again, and then missing: they are counted in `failures`,
    and no verdict is made up for them.

    Args:
        latents: which.
        passages: gives the passages of a latent; called when it is its turn, in this thread.
        explainer: who explains and judges: an endpoint, which is asked about several latents at the same time, or a
            model with a chat template that is run here.
        acts_of: name of the model whose activations are explained, where passages have those of several.
        config: how much is shown and asked.
        log: a file to which every finished latent is added. Latents that it holds already are not asked about again,
            unless they have no explanation.
        budget: what this run may spend; the latents that it does not suffice for are left for another run.
        on_progress: called with latents done and in all.

    Raises:
        InputError: for latents named twice, passages that contradict the activations, a log of other passages or
            settings, or a server that does not know the key or the model.
    """
    if len(set(latents)) < len(latents):
        raise InputError("latents", expected="each latent once", received=list(latents), remedy="leave out repeats")
    before = None if log is None else ExplanationLog(Path(log))
    spending = Spending(budget or Budget())
    found: dict[int, Explanation] = {}
    spent = ""

    def finish(explanation: Explanation) -> None:
        found[explanation.latent] = explanation
        if on_progress is not None:
            on_progress(len(found), len(latents))

    def jobs(ask: Ask) -> Iterator[Callable[[], Explanation]]:
        about = {"explainer": describe(explainer), "config": asdict(config), "acts_of": acts_of, "chance": CHANCE}
        for latent in latents:
            some = passages(latent)
            provenance = {**about, "passages_sha256": evidence_sha256(some, acts_of)}
            known = None if before is None else _known(before, latent, provenance)
            if known is not None:
                finish(known)
            elif not spent:
                evidence = split_evidence(
                    some, acts_of=acts_of, n_shown=config.n_shown, n_scored=config.n_scored, seed=config.seed
                )
                yield partial(_explain, latent, evidence, ask, explainer, acts_of, config, provenance)

    n_concurrent = explainer.max_concurrent if isinstance(explainer, Endpoint) else 1
    n_threads = torch.get_num_threads()  # a new thread would take as many as there are cores
    with (
        ThreadPoolExecutor(n_concurrent, initializer=torch.set_num_threads, initargs=(n_threads,)) as pool,
        answering(explainer, spending) as ask,  # closed first, so that no thread goes on waiting for a retry
    ):
        for future in _completed(jobs(ask), pool, n_concurrent):
            try:
                explanation = future.result()
            except BudgetSpentError as error:
                spent = str(error)
                continue
            if before is not None:
                before.append(explanation)
            finish(explanation)
    run = ExplanationRun(
        explanations=tuple(found[latent] for latent in latents if latent in found),
        unfinished=tuple(latent for latent in latents if latent not in found),
        n_requests=spending.n_requests,
        n_tokens=spending.n_tokens,
    )
    _warn(run, spent)
    return run


def _completed(
    jobs: Iterator[Callable[[], Explanation]], pool: ThreadPoolExecutor, n_concurrent: int
) -> Iterator[Future[Explanation]]:
    """Run some jobs at a time; a job is made when there is room for it."""
    running: set[Future[Explanation]] = set()
    while True:
        running |= {pool.submit(job) for job in islice(jobs, n_concurrent - len(running))}
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        yield from done


def _known(log: ExplanationLog, latent: int, provenance: dict[str, Any]) -> Explanation | None:
    """What the log has of a latent, if it has been explained from the same passages in the same way."""
    known = log.finished.get(latent)
    if known is None or known.text is None:
        return None
    before, now = _identity(known.provenance), _identity(json.loads(json.dumps(provenance)))
    differing = [name for name in now if before.get(name) != now[name]]
    if differing:
        raise InputError(
            "log",
            expected=f"explanations with the same {', '.join(differing)}",
            received=f"another for latent {latent} in {log.path}",
            remedy="write to another file",
        )
    return known


def _identity(provenance: dict[str, Any]) -> dict[str, Any]:
    """What must not change within a log; the same model may answer at another address."""
    return {**provenance, "explainer": {**provenance["explainer"], "base_url": None}}


def _explain(
    latent: int,
    evidence: Evidence,
    ask: Ask,
    explainer: Endpoint | LanguageModel,
    acts_of: str | None,
    config: ExplainConfig,
    provenance: dict[str, Any],
) -> Explanation:
    if evidence.shown:
        outcome = explain_evidence(latent, evidence, ask, acts_of=acts_of, config=config)
    else:
        outcome = Outcome(None, None, None, (Failure("explain", 0, "no passages in which it fires"),))
    return Explanation(
        latent=latent,
        text=outcome.text,
        model=explainer.model if isinstance(explainer, Endpoint) else explainer.name,
        detection=outcome.detection,
        fuzzing=outcome.fuzzing,
        n=len(evidence.shown),
        failures=outcome.failures,
        provenance={**provenance, "versions": versions()},
    )


def _warn(run: ExplanationRun, spent: str) -> None:
    n_missing = sum(one.text is None for one in run.explanations)
    n_partial = sum(bool(one.failures) for one in run.explanations) - n_missing
    if n_missing or n_partial:
        warnings.warn(
            f"of {len(run.explanations)} latents {n_missing} have no explanation and {n_partial} are scored on fewer "
            "passages than there were; see their failures",
            SaetoolsWarning,
            stacklevel=3,
        )
    if run.unfinished:
        warnings.warn(f"{len(run.unfinished)} latents are not explained: {spent}", SaetoolsWarning, stacklevel=3)
