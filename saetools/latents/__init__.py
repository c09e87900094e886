"""Latents over a corpus: how often and how strongly they fire, and where."""

from saetools.latents.statistics import LatentStatistics, measure_latents, with_statistics
from saetools.latents.tally import ActivationTally

__all__ = ["ActivationTally", "LatentStatistics", "measure_latents", "with_statistics"]
