"""Whether an SAE can see what a fine-tune changed at its site, by token role.

An SAE of the base model may be blind to a change that the fine-tune writes between its latents; a diff of latents then
ranks side effects. Four things tell: how well it reconstructs both models; how much of the change tuned - base its
reconstructions reproduce; how much of it lies in the span of the decoder rows that are active there, beside the span of
as many random rows; and the largest directions of what is left. It does not tell whether what it sees matters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saetools.activations.stream import ActivationBlock
from saetools.data.roles import Positions, select_positions
from saetools.models.site import Site
from saetools.provenance import plain
from saetools.sae.model import SAE
from saetools.sae.sparse import SparseLatents
from saetools.stats import Estimate, estimate_ratios

N_DIRECTIONS = 5
LEAST_GAIN = 0.05
"""An SAE whose active rows hold less of the change than random rows and this share more counts as blind to it."""
LEAST_REPRODUCED = 0.2
"""So does one whose reconstructions reproduce less of it than this share, by the upper end of the interval."""
MOST_FVU_RATIO, MOST_FVU_RISE = 2.0, 0.05
"""An SAE does not fit the tuned model if it leaves more than so many times the share of variance unexplained as of the
base, and so much more of it, by the ends of the intervals."""
_CHUNK_ELEMENTS = 1 << 23  # of the decoder rows of some tokens
_RIDGE = 1e-5


@dataclass(frozen=True)
class Adequacy:
    """How an SAE sees base, tuned, and the change between them, at the positions of one role.

    Args:
        fvu_base: fraction of variance unexplained on the base.
        fvu_tuned: on the tuned model, over its own variance.
        l0_base: active latents a token on the base.
        l0_tuned: on the tuned model.
        change: mean squared norm of tuned - base over the mean squared norm of the base's deviation from its mean.
        reproduced: 1 - |(x_t - x_b) - (x'_t - x'_b)|^2 / |x_t - x_b|^2, summed over tokens: the share of the change
            that the difference of the reconstructions x' gives; below 0 if it adds more error than it explains.
        in_active_rows: share of the change inside the span of the decoder rows active in either model.
        in_random_rows: the same for as many of the rows that are active in neither, at random for every token; for
            fewer where there are not as many.
        rest_shares: share of the change along each of the largest directions of what the active rows leave.
        rest_directions: these directions, of length 1.
        n_tokens: tokens.
    """

    fvu_base: Estimate
    fvu_tuned: Estimate
    l0_base: Estimate
    l0_tuned: Estimate
    change: Estimate
    reproduced: Estimate
    in_active_rows: Estimate
    in_random_rows: Estimate
    rest_shares: tuple[float, ...]
    rest_directions: Float[Tensor, "direction d_model"]
    n_tokens: int

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why a diff at these positions should not be trusted; empty if nothing speaks against it."""
        if not self.change.mean > 0:
            return ("the two models are equal at this site",)
        found = []
        if self.in_active_rows.low < self.in_random_rows.high + LEAST_GAIN:
            found.append(
                f"the SAE is blind to the change: {self.in_active_rows.mean:.0%} of it lies in the span of the active "
                f"decoder rows, {self.in_random_rows.mean:.0%} in that of as many random rows"
            )
        elif self.reproduced.high < LEAST_REPRODUCED:
            found.append(
                f"the SAE misses most of the change: its reconstructions reproduce {self.reproduced.mean:.0%} "
                f"[{self.reproduced.low:.0%}, {self.reproduced.high:.0%}] of it"
            )
        most = max(MOST_FVU_RATIO * self.fvu_base.high, self.fvu_base.high + MOST_FVU_RISE)
        if self.fvu_tuned.low > most:
            found.append(
                f"the SAE does not fit the tuned model: FVU {self.fvu_tuned.mean:.3f} there, {self.fvu_base.mean:.3f} "
                "on the base"
            )
        return tuple(found)

    def row(self) -> dict[str, float | int]:
        """All figures but the directions, with the ends of their intervals as `_low` and `_high`."""
        out: dict[str, float | int] = {"n_tokens": self.n_tokens}
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), Estimate):
                out |= {field.name: value.mean, f"{field.name}_low": value.low, f"{field.name}_high": value.high}
        return out

    def to_json(self) -> dict[str, Any]:
        """Everything but the directions, as plain values; what is undefined, such as a share of no change, is null."""
        value: dict[str, Any] = plain(
            {name: each for name, each in dataclasses.asdict(self).items() if name != "rest_directions"}
        )
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any], rest_directions: Float[Tensor, "direction d_model"]) -> Adequacy:
        """From what `to_json` gave, and the directions."""
        estimates = {name: Estimate.from_json(each) for name, each in value.items() if isinstance(each, dict)}
        return cls(
            **estimates,
            rest_shares=tuple(value["rest_shares"]),
            rest_directions=rest_directions,
            n_tokens=value["n_tokens"],
        )


class AdequacySums:
    """Sums over tokens that both models have read, by role and conversation.

    Memory is conversations x d_model for each role, and d_model x d_model.

    Args:
        sae: the SAE.
        site: where it reads.
        n_conversations: conversations in all.
        positions: token roles.
        seed: of the random rows.
    """

    def __init__(
        self, sae: SAE, site: Site, n_conversations: int, positions: Sequence[Positions], *, seed: int
    ) -> None:
        self._sae, self._site, self._n = sae, site, n_conversations
        self._generator = torch.Generator().manual_seed(seed)
        self._sums: dict[Positions, dict[str, Tensor]] = {role: {} for role in positions}
        self._rest = {role: torch.zeros(sae.d_in, sae.d_in, dtype=torch.double) for role in positions}
        self._rows = sae.directions().float()

    def add(
        self, base: ActivationBlock, tuned: ActivationBlock, latents_base: SparseLatents, latents_tuned: SparseLatents
    ) -> None:
        """Count a block of tokens."""
        device = self._sae.W_dec.device
        sides = {"base": (base, latents_base), "tuned": (tuned, latents_tuned)}
        x, recon, values = {}, {}, {"tokens": torch.ones(len(base))}
        for side, (block, latents) in sides.items():
            x[side] = block.acts[self._site].to(device).float()
            recon[side] = self._sae.decode(latents, x[side]).float()
            values |= {
                f"x_{side}": x[side],
                f"square_{side}": x[side].square().sum(1),
                f"error_{side}": (x[side] - recon[side]).square().sum(1),
                f"l0_{side}": (latents.values != 0).sum(1),
            }
        change = x["tuned"] - x["base"]
        active = _active_rows(latents_base, latents_tuned)
        random = random_rows(active, self._sae.d_sae, self._generator)
        inside, rest = self._project(change, active)
        inside_random, _ = self._project(change, random)
        values |= {
            "change": change.square().sum(1),
            "unreproduced": (change - recon["tuned"] + recon["base"]).square().sum(1),
            "inside": inside,
            "inside_random": inside_random,
        }
        for role, sums in self._sums.items():
            chosen = select_positions(base.roles, role)
            here, rows = chosen.to(device), base.documents[chosen]
            for name, value in values.items():
                own = value[here.to(value.device)].double().cpu()
                total = sums.setdefault(name, torch.zeros(self._n, *own.shape[1:], dtype=torch.double))
                total.index_add_(0, rows, own)
            left = rest[here].double()
            self._rest[role] += (left.T @ left).cpu()

    def _project(
        self, change: Float[Tensor, "token d_model"], rows: Int[Tensor, "token slot"]
    ) -> tuple[Float[Tensor, " token"], Float[Tensor, "token d_model"]]:
        """Squared norm of the part in the span of some decoder rows (-1: none), and the rest."""
        inside, rest = [], []
        size = max(1, _CHUNK_ELEMENTS // (max(1, rows.shape[1]) * self._sae.d_in))
        for part, chosen in zip(torch.split(change, size), torch.split(rows, size), strict=True):
            basis = self._rows[chosen.clamp_min(0)].masked_fill_((chosen < 0)[..., None], 0)
            gram = basis @ basis.mT
            gram.diagonal(dim1=1, dim2=2).add_(torch.where(chosen < 0, 1.0, _RIDGE))
            dots = basis @ part[..., None]
            coefficients = torch.cholesky_solve(dots, torch.linalg.cholesky(gram))
            left = part - (coefficients.mT @ basis)[:, 0]
            rest.append(left)
            inside.append(part.square().sum(1) - left.square().sum(1))
        return torch.cat(inside), torch.cat(rest)

    def figures(self, *, n_resamples: int, seed: int) -> dict[Positions, Adequacy]:
        """What was found, by role."""
        return {role: self._figures(role, n_resamples, seed) for role in self._sums}

    def _figures(self, role: Positions, n_resamples: int, seed: int) -> Adequacy:
        s = {name: total[self._sums[role]["tokens"] > 0] for name, total in self._sums[role].items()}
        variance = {}
        for side in ("base", "tuned"):  # of each conversation about the mean of all
            mean = s[f"x_{side}"].sum(0) / s["tokens"].sum()
            variance[side] = s[f"square_{side}"] - 2 * s[f"x_{side}"] @ mean + s["tokens"] * (mean @ mean)
        ratios = {
            "fvu_base": (s["error_base"], variance["base"]),
            "fvu_tuned": (s["error_tuned"], variance["tuned"]),
            "l0_base": (s["l0_base"], s["tokens"]),
            "l0_tuned": (s["l0_tuned"], s["tokens"]),
            "change": (s["change"], variance["base"]),
            "reproduced": (s["change"] - s["unreproduced"], s["change"]),
            "in_active_rows": (s["inside"], s["change"]),
            "in_random_rows": (s["inside_random"], s["change"]),
        }
        above, below = (torch.stack(parts, 1) for parts in zip(*ratios.values(), strict=True))
        estimates = estimate_ratios(above, below, n_resamples=n_resamples, seed=seed)
        energy, directions = torch.linalg.eigh(self._rest[role])
        largest = energy.flip(0)[:N_DIRECTIONS] / s["change"].sum().clamp_min(1e-300)
        return Adequacy(
            **dict(zip(ratios, estimates, strict=True)),
            rest_shares=tuple(largest.tolist()),
            rest_directions=directions.T.flip(0)[:N_DIRECTIONS].float(),
            n_tokens=int(s["tokens"].sum()),
        )


def _active_rows(base: SparseLatents, tuned: SparseLatents) -> Int[Tensor, "token slot"]:
    """Latents active in either model, each once a token; -1 in spare slots."""
    both = torch.cat([torch.where(side.values != 0, side.indices, -1) for side in (base, tuned)], 1).sort(1).values
    again = torch.zeros_like(both, dtype=torch.bool)
    again[:, 1:] = both[:, 1:] == both[:, :-1]
    return both.masked_fill(again, -1)


def random_rows(
    active: Int[Tensor, "token slot"], d_sae: int, generator: torch.Generator
) -> Int[Tensor, "token other_slot"]:
    """As many other latents as are active, without repeats; -1 in spare slots.

    The first of a random order of all latents that are not active themselves, from a random place on: two places for
    each active latent always hold enough. Tokens of one call share the order, not the place.
    """
    n_tokens, n_slots = active.shape
    order = torch.randperm(d_sae, generator=generator)
    starts = torch.randint(d_sae, (n_tokens, 1), generator=generator)
    drawn = order[(starts + torch.arange(min(2 * n_slots, d_sae))) % d_sae].to(active.device)
    known = active.sort(1).values
    place = torch.searchsorted(known, drawn).clamp_max(n_slots - 1)
    free = known.gather(1, place) != drawn
    wanted = free & (free.cumsum(1) <= (active >= 0).sum(1, keepdim=True))
    return torch.where(wanted, drawn, -1).sort(1, descending=True).values[:, :n_slots]
