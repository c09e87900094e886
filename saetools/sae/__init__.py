"""Sparse autoencoders: the model, its sparse arithmetic, training and files."""

from saetools.sae.config import Progress, TrainConfig
from saetools.sae.crosscoder import Crosscoder, load_crosscoder, train_crosscoder
from saetools.sae.io import load_sae, save_sae
from saetools.sae.model import SAE, SAEMetadata
from saetools.sae.nonlinearity import AbsTopK, Gated, JumpReLU, MatchingPursuit, ReLU, TopK
from saetools.sae.objective import BatchTopKLoss, GatedLoss, JumpReLULoss, MatryoshkaLoss, StandardLoss, TopKLoss
from saetools.sae.sparse import SparseLatents
from saetools.sae.train import TrainRun, train_sae, train_saes

__all__ = [
    "SAE",
    "AbsTopK",
    "BatchTopKLoss",
    "Crosscoder",
    "Gated",
    "GatedLoss",
    "JumpReLU",
    "JumpReLULoss",
    "MatchingPursuit",
    "MatryoshkaLoss",
    "Progress",
    "ReLU",
    "SAEMetadata",
    "SparseLatents",
    "StandardLoss",
    "TopK",
    "TopKLoss",
    "TrainConfig",
    "TrainRun",
    "load_crosscoder",
    "load_sae",
    "save_sae",
    "train_crosscoder",
    "train_sae",
    "train_saes",
]
