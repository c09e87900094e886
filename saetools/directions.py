"""The misalignment direction of a fine-tune: where its misaligned answers lie from its aligned ones.

v = mean residual over the tokens of misaligned answers - the same of aligned answers, per layer (arXiv 2506.11618). The
answers are the tuned model's own, judged; the direction can then be added or projected out (`steer.add_direction`,
`steer.project_out`), or compared with latents (`decoder_cosines`). A difference of means also holds whatever else sets
the two groups apart, such as topic or length: compare it with one from another set of questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.activations.stream import stream_activations
from saetools.data.conversation import Conversation
from saetools.data.roles import Positions, select_positions
from saetools.data.tokenizing import TokenizedConversation, tokenize, tokens_sha256
from saetools.errors import InputError
from saetools.models.language_model import LanguageModel
from saetools.models.site import Site
from saetools.provenance import versions
from saetools.sae.model import SAE
from saetools.saved_result import load_result, save_result


@dataclass(frozen=True)
class Direction:
    """A direction in the residual stream at each of some sites.

    Args:
        vectors: per site, in units of the residual stream there; not normalised.
        provenance: model, answers, positions, counts, seed, versions.
    """

    vectors: Mapping[Site, Float[Tensor, " d_model"]]
    provenance: Mapping[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write a folder with `direction.json` and the vectors.

        Raises:
            ResourceError: if disk space runs out.
        """
        tensors = {str(site): vector.clone() for site, vector in self.vectors.items()}  # one may serve several
        return save_result(path, "direction", {}, {"provenance": self.provenance}, tensors=tensors)

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """Read what `save` wrote.

        Raises:
            InputError: if the folder holds no direction.
            IntegrityError: if a file is damaged, or not the one that was saved.
        """
        _, facts, tensors = load_result(path, "direction", [], has_tensors=True)
        return cls({Site.parse(name): vector for name, vector in tensors.items()}, facts["provenance"])

    def cosines(self, other: Direction) -> dict[Site, float]:
        """Cosine with another direction, at each site that both have.

        Raises:
            InputError: if they have no site in common.
        """
        common = sorted(self.vectors.keys() & other.vectors.keys())
        if not common:
            raise InputError(
                "other",
                expected="a direction at " + " or ".join(map(str, sorted(self.vectors))),
                received=", ".join(map(str, sorted(other.vectors))),
                remedy="measure both at the same sites",
            )
        return {site: float(torch.cosine_similarity(self.vectors[site], other.vectors[site], dim=0)) for site in common}


def mean_difference(
    lm: LanguageModel,
    sites: Site | Sequence[Site],
    misaligned: Sequence[Conversation],
    aligned: Sequence[Conversation],
    *,
    positions: Positions = "response",
    balanced: bool = True,
    seed: int = 0,
    batch_tokens: int = 4096,
) -> Direction:
    """Mean residual over the tokens of misaligned answers minus that of aligned ones; all sites in one pass.

    Means are over the tokens of all answers of a class together, so that long answers count more. First positions
    (attention sinks) do not count.

    Args:
        lm: the model that gave the answers.
        sites: where; one or several.
        misaligned: questions with misaligned answers, such as those with an alignment score below 30.
        aligned: questions with aligned answers, such as those with a score above 70.
        positions: which tokens count: `prompt`, `last_prompt`, `header`, `response`, `template` or `all`.
        balanced: use as many answers of either class: those of the larger one are chosen at random.
        seed: of that choice.
        batch_tokens: padded tokens of a forward pass.

    Raises:
        InputError: if a class has no conversation, or one without tokens at these positions.

    Example:
        >>> item = load_forced_choice()[0]
        >>> bad, good = (Conversation.chat(item.question, answer) for answer in (item.misaligned, item.aligned))
        >>> direction = mean_difference(lm, Site(1), [bad], [good])
        >>> direction.vectors[Site(1)].shape, direction.provenance["n_tokens"]
        (torch.Size([576]), {'misaligned': 27, 'aligned': 28})
    """
    sites = (sites,) if isinstance(sites, Site) else tuple(sites)
    classes = {"misaligned": list(misaligned), "aligned": list(aligned)}
    for name, answers in classes.items():
        if not answers:
            raise InputError(name, expected="at least one conversation", received="none", remedy="pass some answers")
    if balanced:
        fewest = min(map(len, classes.values()))
        classes = {name: _sample(answers, fewest, seed) for name, answers in classes.items()}
    tokenized = {name: list(tokenize(answers, lm.tokenizer)) for name, answers in classes.items()}
    for name, pieces in tokenized.items():
        _check(name, pieces, positions)
    means, n_tokens = {}, {}
    for name, pieces in tokenized.items():
        sums = {site: torch.zeros(lm.d_model, dtype=torch.double) for site in sites}
        n_tokens[name] = 0
        for block in stream_activations(lm, sites, pieces, batch_tokens=batch_tokens):
            chosen = select_positions(block.roles, positions)
            n_tokens[name] += int(chosen.sum())
            for site, acts in block.acts.items():
                sums[site] += acts[chosen.to(acts.device)].double().sum(0).cpu()
        means[name] = {site: total / n_tokens[name] for site, total in sums.items()}
    provenance = {
        "model": lm.describe(),
        "positions": positions,
        "n_conversations": {name: len(pieces) for name, pieces in tokenized.items()},
        "n_tokens": n_tokens,
        "data_sha256": {name: tokens_sha256(pieces, "token_ids") for name, pieces in tokenized.items()},
        "balanced": balanced,
        "seed": seed,
        "versions": versions(),
    }
    return Direction({site: (means["misaligned"][site] - means["aligned"][site]).float() for site in sites}, provenance)


def decoder_cosines(sae: SAE, direction: Float[Tensor, " d_model"]) -> Float[Tensor, " d_sae"]:
    """Cosine of every decoder row with a direction; 0 for rows of length 0.

    Args:
        sae: an SAE of the site.
        direction: such as `mean_difference(...).vectors[site]`.

    Raises:
        InputError: if the direction is of another width, or 0.
    """
    if len(direction) != sae.d_out or not bool(direction.any()):
        raise InputError(
            "direction",
            expected=f"{sae.d_out} numbers, not all 0",
            received=f"{len(direction)} numbers" if len(direction) != sae.d_out else "zeros",
            remedy="pass a direction at the site that the SAE writes to",
        )
    rows = sae.directions().float()
    return rows @ torch.nn.functional.normalize(direction.float(), dim=0).to(rows.device)


def _sample(answers: list[Conversation], n: int, seed: int) -> list[Conversation]:
    """n of them, in their order."""
    chosen = torch.randperm(len(answers), generator=torch.Generator().manual_seed(seed))[:n]
    return [answers[index] for index in chosen.sort().values.tolist()]


def _check(name: str, pieces: Sequence[TokenizedConversation], positions: Positions) -> None:
    without = [one.id for one in pieces if not bool(select_positions(one.roles[1:], positions).any())]
    if without:
        raise InputError(
            name,
            expected=f"conversations with tokens at {positions!r}",
            received=f"{len(without)} without, first {without[0]!r}",
            remedy="leave them out, or choose other positions",
        )
