"""Small random SAEs, and a spy on the sizes of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saetools.sae import SAE, AbsTopK, Gated, JumpReLU, MatchingPursuit, ReLU, SAEMetadata, TopK, sparse
from saetools.sae.weights import Weights


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class _LargestTensor(TorchDispatchMode):
    """Remembers the most entries that the memory of any result had room for."""

    def __init__(self) -> None:
        super().__init__()
        self.n_entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.n_entries = max(self.n_entries, _room(tensor))
        return out


def _room(tensor: torch.Tensor) -> int:
    if tensor.layout == torch.sparse_csr:
        return tensor._nnz()
    return tensor.untyped_storage().nbytes() // tensor.element_size()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are divided, too, where a test lowers the budget."""
    monkeypatch.setattr(sparse, "LEAST_CHUNK_TOKENS", 1)


@pytest.fixture
def largest_tensor() -> Callable[[], Any]:
    """`with largest_tensor() as largest: ...`, then `largest.n_entries`."""

    @contextmanager
    def spy() -> Iterator[_LargestTensor]:
        with _LargestTensor() as mode:
            yield mode

    return spy


def random_weights(d_in: int, d_sae: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    decoder = torch.nn.functional.normalize(randn(d_sae, d_in), dim=1)
    return Weights(decoder + 0.1 * randn(d_sae, d_in), decoder, 0.1 * randn(d_sae), randn(d_in))


@pytest.fixture
def make_weights() -> Callable[..., Weights]:
    """`make_weights(d_in, d_sae, seed=0, dtype=float32)`."""
    return random_weights


@pytest.fixture
def make_sae() -> Callable[..., SAE]:
    """`make_sae(kind, d_in=16, d_sae=64, k=4)`: a random SAE, decoder rows of any norm.

    Kinds are `topk`, `relu`, `jumprelu`, `gated`, `abstopk` and `matching_pursuit`; other settings are those of `SAE`.
    """

    def make(kind: str = "topk", *, d_in: int = 16, d_sae: int = 64, k: int = 4, **settings: Any) -> SAE:
        nonlinearity = {
            "topk": lambda: TopK(k),
            "relu": ReLU,
            "jumprelu": lambda: JumpReLU(torch.linspace(0.2, 2, d_sae)),
            "abstopk": lambda: AbsTopK(k),
            "matching_pursuit": lambda: MatchingPursuit(1.5, max_steps=6),
            "gated": lambda: Gated(torch.linspace(-0.5, 0.5, d_sae), torch.linspace(-1, 2, d_sae)),
        }[kind]()
        settings = {"metadata": SAEMetadata(model_name="tiny", site="blocks.1.hook_resid_post")} | settings
        sae = SAE(d_in, d_sae, nonlinearity, **settings)
        values = {**vars(random_weights(d_in, d_sae))}
        if sae.d_out != d_in or sae.W_skip is not None:
            values |= {name: value for name, value in vars(random_weights(sae.d_out, d_sae)).items() if "dec" in name}
        if sae.W_skip is not None:
            values["W_skip"] = values["W_dec"][: sae.d_out, :1].expand(-1, d_in) * torch.linspace(-1, 1, d_in)
        for name, value in values.items():
            parameter = getattr(sae, name)
            parameter.data.copy_(value * (torch.linspace(0.5, 2, d_sae)[:, None] if name == "W_dec" else 1))
        if kind == "matching_pursuit":  # tied
            sae.W_dec.data.copy_(torch.nn.functional.normalize(sae.W_dec, dim=1))
            sae.encoder.data.copy_(sae.W_dec)
            sae.b_enc.data.zero_()
        return sae.eval().requires_grad_(False)

    return make
