"""Which passages an explanation is made from, and which others it is scored on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from saetools.errors import InputError
from saetools.latents.passage import Passage


@dataclass(frozen=True)
class LatentPassages:
    """What is known of one latent: passages in which it fires, and others in which it does not."""

    active: tuple[Passage, ...]
    inactive: tuple[Passage, ...]


@dataclass(frozen=True)
class Evidence:
    """A latent's passages, divided; no document is on both sides.

    Args:
        shown: to the explainer, strongest first.
        active: held out, in which it fires; each of another document.
        inactive: held out, in which it does not; each of another document.
    """

    shown: tuple[Passage, ...]
    active: tuple[Passage, ...]
    inactive: tuple[Passage, ...]


def split_evidence(
    passages: LatentPassages, *, acts_of: str | None = None, n_shown: int = 20, n_scored: int = 20, seed: int = 0
) -> Evidence:
    """Hold out documents at random, and choose what to show among the others.

    Up to `n_scored` documents, but at most half of those with active passages, are held out, and one passage of each,
    so that what is scored is independent. Half of what is shown are the strongest passages; the rest are spread evenly
    over the others, from strong to weak, since the strongest alone often tell of a narrower latent.

    Args:
        passages: of the latent.
        acts_of: name of the model whose activations count; needed if the passages have those of several.
        n_shown: passages for the explainer.
        n_scored: held-out passages of either kind.
        seed: of the choice of documents and passages.

    Raises:
        InputError: for an active passage in which the latent does not fire, or an inactive one in which it does.
    """
    for kind, some in (("active", passages.active), ("inactive", passages.inactive)):
        for passage in some:
            if (strength(passage, acts_of) > 0) != (kind == "active"):
                raise InputError(
                    f"passages.{kind}",
                    expected=f"passages that are {kind} in {acts_of or 'the model'}",
                    received=f"one of {passage.document_id!r} whose largest activation is {strength(passage, acts_of)}",
                    remedy="sort them by this model's activations",
                )
    generator = torch.Generator().manual_seed(seed)
    documents = sorted(set(map(_document, passages.active)))
    order = torch.randperm(len(documents), generator=generator).tolist()
    held_out = {documents[place] for place in order[: min(n_scored, len(documents) // 2)]}
    usable = [passage for passage in passages.active if _document(passage) not in held_out]
    used = set(map(_document, usable))
    active = _one_of_each(
        (passage for passage in passages.active if _document(passage) in held_out), n_scored, generator
    )
    inactive = _one_of_each(
        (passage for passage in passages.inactive if _document(passage) not in used), n_scored, generator
    )
    ranked = sorted(usable, key=lambda passage: -strength(passage, acts_of))
    return Evidence(_strong_and_spread(ranked, n_shown), active, inactive)


def firing(passage: Passage, acts_of: str | None) -> tuple[float, ...]:
    """How strongly a latent fires at each token of a passage: the size of its activation, which may be negative.

    Raises:
        InputError: if it does not say in which model, or has none of that model.
    """
    names = list(passage.acts)
    if acts_of is None and len(names) == 1:
        acts_of = names[0]
    if acts_of not in passage.acts:
        raise InputError(
            "acts_of",
            expected="one of the models with activations: " + ", ".join(names),
            received=repr(acts_of),
            remedy="name the model whose activations are to be explained",
        )
    return tuple(map(abs, passage.acts[acts_of]))


def strength(passage: Passage, acts_of: str | None) -> float:
    """The largest size of an activation in a passage."""
    return max(firing(passage, acts_of), default=0.0)


def evidence_sha256(passages: LatentPassages, acts_of: str | None) -> str:
    """Hash of passages and activations, in hexadecimal."""
    digest = hashlib.sha256()
    for some in (passages.active, passages.inactive):
        for passage in some:
            place = [passage.dataset, passage.document, passage.start, passage.token_ids]
            digest.update(json.dumps([*place, firing(passage, acts_of)]).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def _document(passage: Passage) -> tuple[str, str]:
    """Long texts are indexed in several stretches, which have one id."""
    return passage.dataset, passage.document_id or str(passage.document)


def _one_of_each(passages: Iterable[Passage], n: int, generator: torch.Generator) -> tuple[Passage, ...]:
    """One random passage of each of n random documents."""
    some = list(passages)
    chosen: dict[tuple[str, str], Passage] = {}
    for place in torch.randperm(len(some), generator=generator).tolist():
        chosen.setdefault(_document(some[place]), some[place])
    return tuple(chosen.values())[:n]


def _strong_and_spread(ranked: Sequence[Passage], n: int) -> tuple[Passage, ...]:
    """The strongest half of n, and the rest at even steps through the others."""
    n_strong = (n + 1) // 2 if len(ranked) > n else n
    others = ranked[n_strong:]
    n_spread = min(n - n_strong, len(others))
    return (*ranked[:n_strong], *(others[(2 * step + 1) * len(others) // (2 * n_spread)] for step in range(n_spread)))
