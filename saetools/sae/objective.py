"""What each kind of SAE minimises: small settings objects, told apart by their class.

| loss | after training | sparsity | source |
|---|---|---|---|
| `TopKLoss` | `TopK` | k latents a token | arXiv 2406.04093 |
| `BatchTopKLoss` | `JumpReLU` | k latents a token on average | arXiv 2412.06410 |
| `MatryoshkaLoss` | `JumpReLU` | the same, for nested dictionaries | arXiv 2503.17547 |
| `StandardLoss` | `ReLU` | L1, weighted with decoder norms | Anthropic, April 2024 |
| `GatedLoss` | `Gated` | L1 on the gate | arXiv 2404.16014 |
| `JumpReLULoss` | `JumpReLU` | L0 with straight-through gradients | arXiv 2407.14435 |

The first three train several times faster: they never compute with inactive latents. Squared errors are summed over
dimensions and averaged over tokens, so that coefficients compare with SAELens'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saetools.errors import InputError
from saetools.sae.dense import Step, dense_step
from saetools.sae.loss import batch_topk_step, topk_step
from saetools.sae.nonlinearity import Gated, JumpReLU, Nonlinearity, ReLU, TopK
from saetools.sae.weights import GatedWeights, JumpReLUWeights, Weights
from saetools.team import ALONE, Team

_START_NORM = 0.1  # of encoder and decoder rows of dense kinds: unit rows would first be dense and far too loud


@dataclass
class StepContext:
    """What a step knows beyond its batch and the weights.

    Args:
        dead: latents that have not fired for long; in sparse kinds they learn to reconstruct the error (AuxK).
        encode_dtype: dtype of the encoder product; sparse kinds compute the values of the latents that it chooses in
            the dtype of the weights.
        step: steps done before.
        buffers: running figures of the loss, which a checkpoint keeps; a step updates them.
        team: processes that share the batch or the latents.
    """

    dead: Bool[Tensor, " d_sae"]
    encode_dtype: torch.dtype
    step: int
    buffers: dict[str, Tensor]
    team: Team = ALONE


class Loss(Protocol):
    """What training asks of a loss."""

    unit_norm: ClassVar[bool]
    """Whether decoder rows are kept at length 1 while training."""
    weights_type: ClassVar[type[Weights]]
    """What is trained."""
    encode_dtypes: ClassVar[tuple[str, ...]]
    """Dtypes that the encoder product may have."""

    def check(self, d_sae: int) -> None:
        """Refuse settings that do not fit the number of latents."""
        ...

    def check_division(self, d_sae: int, n_processes: int) -> None:
        """Refuse to divide the latents between so many processes."""
        ...

    def start(self, weights: Weights) -> tuple[Weights, dict[str, Tensor]]:
        """All weights and buffers of this kind, from unit rows and a centre."""
        ...

    def step(self, x: Float[Tensor, "token d_in"], weights: Any, grads: Any, context: StepContext) -> Step:
        """One batch; writes the gradients."""
        ...

    def nonlinearity(self, weights: Any, buffers: dict[str, Tensor], unit: Float[Tensor, " d_sae"]) -> Nonlinearity:
        """What the trained SAE uses; thresholds and biases are multiplied by `unit`."""
        ...


@dataclass(frozen=True)
class TopKLoss:
    """Squared error of the k largest latents of each token."""

    k: int = 32
    """Active latents a token."""
    k_aux: int = 256
    """Dead latents that learn from each token's error."""
    aux_coefficient: float = 1 / 32
    """Weight of that loss."""

    unit_norm: ClassVar[bool] = False
    weights_type: ClassVar[type[Weights]] = Weights
    encode_dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "int8")

    def check(self, d_sae: int) -> None:
        """Refuse a k that does not fit."""
        if not 1 <= self.k <= d_sae:
            raise InputError("loss.k", expected=f"1 to d_sae = {d_sae}", received=self.k, remedy="pick another k")

    def check_division(self, d_sae: int, n_processes: int) -> None:
        """Refuse parts that are too small."""
        if self._least_width(d_sae) < n_processes or d_sae // n_processes < self.k:
            raise InputError(
                "config.shard_latents",
                expected=f"at least k = {self.k} of {d_sae} latents, and one of each dictionary, for each process",
                received=f"{n_processes} processes",
                remedy="use fewer, or divide the tokens",
            )

    def _least_width(self, d_sae: int) -> int:
        return d_sae

    def start(self, weights: Weights) -> tuple[Weights, dict[str, Tensor]]:
        """As given."""
        return weights, {}

    def step(self, x: Tensor, weights: Weights, grads: Weights, context: StepContext) -> Step:
        """One batch."""
        done = topk_step(
            x,
            weights,
            self.k,
            encode_dtype=context.encode_dtype,
            dead=context.dead,
            k_aux=self.k_aux,
            aux_coefficient=self.aux_coefficient,
            grads=grads,
            team=context.team,
        )
        strength = torch.bincount(done.indices.flatten(), done.values.flatten(), minlength=len(weights.b_enc))
        n_active = context.team.over_both((done.values > 0).sum())
        return Step(done.loss, done.error, context.team.over_tokens(strength) > 0, n_active, done.n_tokens)

    def nonlinearity(self, weights: Weights, buffers: dict[str, Tensor], unit: Tensor) -> Nonlinearity:
        """The same k."""
        return TopK(self.k)


@dataclass(frozen=True)
class BatchTopKLoss(TopKLoss):
    """Squared error of the k x batch largest latents of each batch; a threshold takes their place afterwards."""

    threshold_memory: float = 0.99
    """Share of the running mean of the smallest active latent of a batch that the next batch leaves."""

    encode_dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")

    def start(self, weights: Weights) -> tuple[Weights, dict[str, Tensor]]:
        """As given, and a threshold that is not known yet."""
        return weights, {"threshold": torch.full((), -1.0, device=weights.b_enc.device)}

    def step(self, x: Tensor, weights: Weights, grads: Weights, context: StepContext) -> Step:
        """One batch; moves the threshold."""
        team, d_own = context.team, len(weights.b_enc)
        done = batch_topk_step(
            x,
            weights,
            self.k,
            widths=self._widths(int(team.over_latents(torch.tensor(d_own, device=x.device)))),
            encode_dtype=context.encode_dtype,
            dead=context.dead,
            k_aux=self.k_aux,
            aux_coefficient=self.aux_coefficient,
            grads=grads,
            team=context.team,
        )
        active = done.strength > 0
        smallest = team.least(
            torch.where(active, done.strength, torch.inf).min() if len(active) else x.new_tensor(torch.inf)
        )
        if bool(torch.isfinite(smallest)):
            threshold = context.buffers["threshold"]
            memory = self.threshold_memory if float(threshold) >= 0 else 0.0
            threshold.mul_(memory).add_(smallest, alpha=1 - memory)
        strength = torch.bincount(done.latents, done.strength, minlength=d_own)
        n_active = team.over_both(active.sum())
        return Step(done.loss, done.error, team.over_tokens(strength) > 0, n_active, done.n_tokens)

    def nonlinearity(self, weights: Weights, buffers: dict[str, Tensor], unit: Tensor) -> Nonlinearity:
        """The learnt threshold, the same for all latents once their decoder rows have length 1."""
        return JumpReLU(buffers["threshold"].clamp_min(0) * unit / torch.linalg.vector_norm(weights.W_dec, dim=1))

    def _widths(self, d_sae: int) -> list[int]:
        return [d_sae]


@dataclass(frozen=True)
class MatryoshkaLoss(BatchTopKLoss):
    """The BatchTopK loss, averaged over nested dictionaries: the first latents have to reconstruct by themselves."""

    shares: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Sizes of the dictionaries, ascending, as shares of d_sae; the last is 1."""

    def check(self, d_sae: int) -> None:
        """Refuse shares that do not nest."""
        super().check(d_sae)
        widths = self._widths(d_sae)
        if sorted(set(widths)) != widths or widths[:1] <= [0] or widths[-1:] != [d_sae]:
            raise InputError(
                "loss.shares",
                expected="ascending shares of d_sae that end with 1",
                received=self.shares,
                remedy="pass such as (0.25, 0.5, 1.0)",
            )

    def _widths(self, d_sae: int) -> list[int]:
        return [round(share * d_sae) for share in self.shares]

    def _least_width(self, d_sae: int) -> int:
        return self._widths(d_sae)[0]


@dataclass(frozen=True)
class StandardLoss:
    """Squared error plus L1: sum_j f_j ||d_j||."""

    sparsity: float = 5.0
    """Coefficient of the sparsity loss, or where it starts if there is a target."""
    target_l0: float | None = None
    """Active latents a token to steer the coefficient to; `None` keeps it."""
    sparsity_warmup_steps: int = 1000
    """Steps over which the coefficient rises from 0, 1 or more."""

    unit_norm: ClassVar[bool] = False
    weights_type: ClassVar[type[Weights]] = Weights
    encode_dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")

    def check(self, d_sae: int) -> None:
        """Refuse figures that cannot be."""
        if self.sparsity <= 0:
            raise InputError("loss.sparsity", expected="more than 0", received=self.sparsity, remedy="raise it")
        if self.sparsity_warmup_steps < 1:
            raise InputError(
                "loss.sparsity_warmup_steps",
                expected="1 or more",
                received=self.sparsity_warmup_steps,
                remedy="raise it",
            )
        if self.target_l0 is not None and not 0 < self.target_l0 < d_sae:
            raise InputError(
                "loss.target_l0", expected=f"more than 0, below {d_sae}", received=self.target_l0, remedy="change it"
            )

    def check_division(self, d_sae: int, n_processes: int) -> None:
        """Refuse: latents that are not sparse at first would all have to be told."""
        raise InputError(
            "config.shard_latents",
            expected="TopKLoss, BatchTopKLoss or MatryoshkaLoss, to divide latents",
            received=type(self).__name__,
            remedy="leave it out, which divides the tokens",
        )

    def start(self, weights: Weights) -> tuple[Weights, dict[str, Tensor]]:
        """Short rows, and the coefficient."""
        small = Weights(weights.encoder * _START_NORM, weights.W_dec * _START_NORM, weights.b_enc, weights.b_dec)
        return small, {"sparsity": torch.full((), self.sparsity, device=weights.b_enc.device)}

    def step(self, x: Tensor, weights: Weights, grads: Weights, context: StepContext) -> Step:
        """One batch; moves the coefficient if there is a target."""
        coefficient = min(1.0, context.step / self.sparsity_warmup_steps) * float(context.buffers["sparsity"])
        chunk_loss = self._chunk_loss(coefficient, context)
        done = dense_step(x, weights, grads, chunk_loss, encode_dtype=context.encode_dtype, team=context.team)
        if self.target_l0 is not None:
            l0 = float(done.n_active) / done.n_tokens
            # Slow enough for the weights to follow: twice too many raise it by a third of a per cent a step.
            context.buffers["sparsity"].mul_(min(max(l0 / self.target_l0, 0.1), 10.0) ** 0.005)
        return done

    def nonlinearity(self, weights: Weights, buffers: dict[str, Tensor], unit: Tensor) -> Nonlinearity:
        """A plain ReLU."""
        return ReLU()

    def _chunk_loss(self, coefficient: float, context: StepContext) -> Callable[[Tensor, Any], Any]:
        def run(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
            f = ((x - weights.b_dec) @ weights.encoder.T + weights.b_enc).relu()
            error = x - (f @ weights.W_dec + weights.b_dec)
            l1 = (f.to(x.dtype) @ weights.W_dec.norm(dim=1)).sum()
            return error.to(x.dtype).square().sum() + coefficient * l1, error, f

        return run


@dataclass(frozen=True)
class GatedLoss(StandardLoss):
    """Squared error, L1 on the gate's pre-activations, and the error of reconstructing from these alone."""

    unit_norm: ClassVar[bool] = True  # the gate's losses would shrink longer decoder rows to nothing
    weights_type: ClassVar[type[Weights]] = GatedWeights

    def start(self, weights: Weights) -> tuple[Weights, dict[str, Tensor]]:
        """Gate and magnitude alike."""
        small, buffers = super().start(weights)
        zeros = torch.zeros_like(small.b_enc)
        parts = {**vars(small), "W_dec": weights.W_dec}
        return GatedWeights(**parts, r_mag=zeros, b_mag=zeros.clone()), buffers

    def nonlinearity(self, weights: Any, buffers: dict[str, Tensor], unit: Tensor) -> Nonlinearity:
        """The learnt magnitudes."""
        return Gated(weights.r_mag.clone(), weights.b_mag * unit)

    def _chunk_loss(self, coefficient: float, context: StepContext) -> Callable[[Tensor, Any], Any]:
        def run(x: Tensor, weights: GatedWeights) -> tuple[Tensor, Tensor, Tensor]:
            pre = (x - weights.b_dec) @ weights.encoder.T
            gate = (pre + weights.b_enc).relu()
            f = torch.where(gate > 0, (pre * weights.r_mag.exp() + weights.b_mag).relu(), 0.0)
            error = x - (f @ weights.W_dec + weights.b_dec)
            by_gate = x - (gate @ weights.W_dec.detach() + weights.b_dec.detach())
            l1 = (gate.to(x.dtype) @ weights.W_dec.norm(dim=1)).sum()
            return error.to(x.dtype).square().sum() + coefficient * l1 + by_gate.to(x.dtype).square().sum(), error, f

        return run


@dataclass(frozen=True)
class JumpReLULoss(StandardLoss):
    """Squared error plus L0, whose gradient goes to the thresholds; dead latents are drawn towards theirs."""

    sparsity: float = 1.0
    """Coefficient of L0, or where it starts if there is a target."""
    bandwidth: float = 0.05
    """Width of the window around a threshold in which pre-activations move it, inputs having norm sqrt(d_in)."""
    start_threshold: float = 0.01
    """Where thresholds begin."""
    pre_act_coefficient: float = 3e-6
    """Weight of sum_j relu(threshold_j - pre_j) ||d_j|| over dead latents (Anthropic, January 2025)."""

    weights_type: ClassVar[type[Weights]] = JumpReLUWeights

    def start(self, weights: Weights) -> tuple[Weights, dict[str, Tensor]]:
        """Short rows, low thresholds."""
        small, buffers = super().start(weights)
        log_threshold = torch.full_like(small.b_enc, self.start_threshold).log()
        return JumpReLUWeights(**vars(small), log_threshold=log_threshold), buffers

    def nonlinearity(self, weights: Any, buffers: dict[str, Tensor], unit: Tensor) -> Nonlinearity:
        """The learnt thresholds."""
        return JumpReLU(weights.log_threshold.exp() * unit)

    def _chunk_loss(self, coefficient: float, context: StepContext) -> Callable[[Tensor, Any], Any]:
        def run(x: Tensor, weights: JumpReLUWeights) -> tuple[Tensor, Tensor, Tensor]:
            pre = ((x - weights.b_dec) @ weights.encoder.T + weights.b_enc).relu()
            threshold = weights.log_threshold.exp()
            f = _Jump.apply(pre, threshold, self.bandwidth)  # type: ignore[no-untyped-call]
            l0 = _Count.apply(pre, threshold, self.bandwidth).sum()  # type: ignore[no-untyped-call]
            error = x - (f @ weights.W_dec + weights.b_dec)
            loss = error.to(x.dtype).square().sum() + coefficient * l0
            if self.pre_act_coefficient:
                below = ((threshold - pre).relu() * context.dead).to(x.dtype) @ weights.W_dec.norm(dim=1)
                loss = loss + self.pre_act_coefficient * below.sum()
            return loss, error, f

        return run


def _window(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """A rectangle of area 1 around the threshold, in place of a delta function."""
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype) / bandwidth


class _Jump(torch.autograd.Function):
    """pre where it is above the threshold; the threshold's gradient is -threshold * window * gradient."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        (grad,) = grads
        moved = -(threshold * _window(pre, threshold, ctx.bandwidth) * grad).sum(0)
        return torch.where(pre > threshold, grad, 0.0), moved, None


class _Count(torch.autograd.Function):
    """1 where pre is above the threshold; only the threshold has a gradient, -window * gradient."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        return None, -(_window(pre, threshold, ctx.bandwidth) * grads[0]).sum(0), None


AnyLoss = TopKLoss | BatchTopKLoss | MatryoshkaLoss | StandardLoss | GatedLoss | JumpReLULoss
"""A loss that `train_sae` can minimise."""
