"""Residual activations: as an iterator, and as a store on disk."""

from saetools.activations.store import ActivationStore, HarvestConfig, SiteActivations, harvest
from saetools.activations.stream import ActivationBlock, stream_activations

__all__ = ["ActivationBlock", "ActivationStore", "HarvestConfig", "SiteActivations", "harvest", "stream_activations"]
