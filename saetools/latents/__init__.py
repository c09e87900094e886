"""Latents over a corpus: how often and how strongly they fire, and where."""

from saetools.latents.index import index_latents
from saetools.latents.passage import Passage
from saetools.latents.record import (
    ActiveDocument,
    Activity,
    CoactiveLatent,
    DecoderNeighbour,
    LatentRecord,
    QuantileBin,
    TokenLatent,
)
from saetools.latents.statistics import LatentStatistics, measure_latents, with_statistics
from saetools.latents.store import LatentStore
from saetools.latents.tally import ActivationTally
from saetools.latents.vocabulary import token_bytes
from saetools.latents.write import write_latents

__all__ = [
    "ActivationTally",
    "ActiveDocument",
    "Activity",
    "CoactiveLatent",
    "DecoderNeighbour",
    "LatentRecord",
    "LatentStatistics",
    "LatentStore",
    "Passage",
    "QuantileBin",
    "TokenLatent",
    "index_latents",
    "measure_latents",
    "token_bytes",
    "with_statistics",
    "write_latents",
]
