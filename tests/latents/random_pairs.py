"""A random corpus and random active latents on it, with the dense matrix that they make up.

`python random_pairs.py OUT` writes a store of them, prints a line after every stage and then waits for a line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from saetools.data import Role, TokenizedConversation
from saetools.latents import write_latents
from saetools.sae.sparse import TokenMajorPairs

D_SAE = 40
DEAD, DENSE, RARE = 7, 3, 11
VOCABULARY = [b"a", b" b", b"\xc3", b"\xa9", b"\n", b"z"]
MODELS = ("base", "tuned")
ROLES = (Role.TEMPLATE, Role.PROMPT, Role.HEADER, Role.RESPONSE, Role.HEADER | Role.LAST_PROMPT)


def documents(n: int = 40, *, longest: int = 30) -> list[TokenizedConversation]:
    """Documents of many lengths in two datasets; token 5 never occurs."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest, (n,), generator=generator).tolist()
    return [
        TokenizedConversation(
            torch.randint(len(VOCABULARY) - 1, (length,), generator=generator),
            torch.tensor(ROLES, dtype=torch.uint8)[torch.randint(len(ROLES), (length,), generator=generator)],
            id=f"document-{number}",
            source="news" if number % 3 else "chats",
        )
        for number, length in enumerate(lengths)
    ]


def dense(corpus: list[TokenizedConversation], model: str, *, d_sae: int = D_SAE) -> torch.Tensor:
    """Activations on all tokens, in bfloat16's precision: some negative, none on first positions."""
    generator = torch.Generator().manual_seed(MODELS.index(model))
    shape = sum(map(len, corpus)), d_sae
    rates = torch.logspace(-2, -0.5, d_sae)
    rates[DEAD], rates[DENSE], rates[RARE] = 0, 0.9, 0
    active = torch.rand(shape, generator=generator) < rates
    active[shape[0] // 2, RARE] = True
    acts = torch.randn(shape, generator=generator).bfloat16().float() * active
    lengths = torch.tensor([len(one) for one in corpus])
    acts[lengths.cumsum(0) - lengths] = 0
    return acts


def reader(corpus: list[TokenizedConversation], models: tuple[str, ...]) -> Any:
    """What gives the pairs of a range of documents."""
    acts = {model: dense(corpus, model) for model in models}
    starts = torch.tensor([0, *map(len, corpus)]).cumsum(0).tolist()

    def read(some: range) -> dict[str, TokenMajorPairs]:
        found = {}
        for model, matrix in acts.items():
            here = matrix[starts[some.start] : starts[some.stop]]
            tokens, latents = here.nonzero(as_tuple=True)
            found[model] = TokenMajorPairs(tokens, latents, here[tokens, latents], len(here))
        return found

    return read


def write(out: Path, corpus: list[TokenizedConversation] | None = None, **settings: Any) -> None:
    """Write a store; what is given stands in place of the usual settings."""
    corpus = documents() if corpus is None else corpus
    directions = torch.nn.functional.normalize(torch.randn(D_SAE, 6, generator=torch.Generator().manual_seed(5)))
    usual = {
        "models": MODELS,
        "directions": directions,
        "vocabulary": VOCABULARY,
        "provenance": {},
        "shard_tokens": 100,
    }
    settings = {**usual, **settings}
    read = settings.pop("read", None) or reader(corpus, settings["models"])
    write_latents(out, corpus, read, **settings)


if __name__ == "__main__":

    def report(done: int, total: int) -> None:
        print(done, flush=True)
        sys.stdin.readline()

    torch.set_num_threads(1)
    write(Path(sys.argv[1]), on_progress=report)
