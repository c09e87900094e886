"""What a latent store tells of one latent."""

from __future__ import annotations

from dataclasses import dataclass

from saetools.data.roles import Positions
from saetools.latents.passage import Passage


@dataclass(frozen=True)
class Activity:
    """How much a latent is active in one model at the positions of one role in one dataset.

    Args:
        model: the model.
        dataset: the dataset.
        positions: the role.
        n_tokens: counted tokens there.
        rate: share of them on which the latent is active.
        mean: its mean activation over them.
    """

    model: str
    dataset: str
    positions: Positions
    n_tokens: int
    rate: float
    mean: float


@dataclass(frozen=True)
class QuantileBin:
    """Random passages from one stretch of a latent's activations, sorted by size.

    Args:
        low: share of its active tokens on which it is weaker than in this bin.
        high: share on which it is weaker than where the bin ends.
        passages: around random ones of the tokens between.
    """

    low: float
    high: float
    passages: tuple[Passage, ...]


@dataclass(frozen=True)
class ActiveDocument:
    """A document that a latent is active in; `mean` is the mean size of its activation over the document's tokens."""

    dataset: str
    document: int
    document_id: str
    mean: float


@dataclass(frozen=True)
class CoactiveLatent:
    """A latent that is active together with another one.

    Args:
        latent: this latent.
        rate: share of the other's active tokens on which it is active.
        pmi: logarithm of how much more often that is than on all tokens.
        cosine: of the two latents' activations over the corpus.
    """

    latent: int
    rate: float
    pmi: float
    cosine: float


@dataclass(frozen=True)
class DecoderNeighbour:
    """A latent whose decoder row is near that of another one."""

    latent: int
    cosine: float


@dataclass(frozen=True)
class TokenLatent:
    """A latent on the occurrences of one token.

    Args:
        latent: the latent.
        rate: share of the occurrences on which it is active.
        mean: its mean activation over them.
        pmi: logarithm of how much more often it is active there than on all tokens.
    """

    latent: int
    rate: float
    mean: float
    pmi: float


@dataclass(frozen=True)
class LatentRecord:
    """One latent: where it fires, how much, and with what; by default, nothing of that is known.

    Args:
        latent: the latent.
        model: the model by whose activations passages, documents and co-active latents were chosen.
        n_active: tokens on which it is active in that model.
        n_documents: documents that these are in.
        max: its largest activation in that model; 0 if it has none.
        top: passages around its largest activations, each from another document, largest first.
        bins: random passages from equal parts of its active tokens, from weak to strong; no two passages of a bin are
            from one document, and none overlaps with another of the record.
        activity: rate and mean by model, dataset and role.
        documents: where its mean size is largest.
        coactive: latents with the largest cosine of activations, estimated from 1,024 of its tokens if it has more.
        neighbours: latents with the nearest decoder rows.
    """

    latent: int
    model: str = ""
    n_active: int = 0
    n_documents: int = 0
    max: float = 0.0
    top: tuple[Passage, ...] = ()
    bins: tuple[QuantileBin, ...] = ()
    activity: tuple[Activity, ...] = ()
    documents: tuple[ActiveDocument, ...] = ()
    coactive: tuple[CoactiveLatent, ...] = ()
    neighbours: tuple[DecoderNeighbour, ...] = ()
