"""Sparse autoencoders: the model, its sparse arithmetic, training and files."""

from saetools.sae.io import load_sae, save_sae
from saetools.sae.model import SAE, SAEMetadata
from saetools.sae.nonlinearity import JumpReLU, TopK
from saetools.sae.sparse import SparseLatents
from saetools.sae.train import Progress, TrainConfig, train_sae

__all__ = [
    "SAE",
    "JumpReLU",
    "Progress",
    "SAEMetadata",
    "SparseLatents",
    "TopK",
    "TrainConfig",
    "load_sae",
    "save_sae",
    "train_sae",
]
