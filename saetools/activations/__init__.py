"""Residual activations: as an iterator, as a store on disk, and as shuffled batches to train on."""

from saetools.activations.paired import PairedActivations
from saetools.activations.shuffle import Activations, SiteActivations
from saetools.activations.store import ActivationStore, HarvestConfig, StoredActivations, harvest
from saetools.activations.stream import ActivationBlock, StreamedActivations, stream_activations

__all__ = [
    "ActivationBlock",
    "ActivationStore",
    "Activations",
    "HarvestConfig",
    "PairedActivations",
    "SiteActivations",
    "StoredActivations",
    "StreamedActivations",
    "harvest",
    "stream_activations",
]
