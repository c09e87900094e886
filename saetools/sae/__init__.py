"""Sparse autoencoders: the model, its sparse arithmetic, training and files."""

from saetools.sae.io import load_sae, save_sae
from saetools.sae.model import SAE, SAEMetadata
from saetools.sae.nonlinearity import AbsTopK, Gated, JumpReLU, MatchingPursuit, ReLU, TopK
from saetools.sae.sparse import SparseLatents
from saetools.sae.train import Progress, TrainConfig, train_sae

__all__ = [
    "SAE",
    "AbsTopK",
    "Gated",
    "JumpReLU",
    "MatchingPursuit",
    "Progress",
    "ReLU",
    "SAEMetadata",
    "SparseLatents",
    "TopK",
    "TrainConfig",
    "load_sae",
    "save_sae",
    "train_sae",
]
