"""The policy losses of GRPO and its variants: pure functions of log-probabilities, advantages and weights.

    ρ = exp(ℓ_new − ℓ_old)
    L = −min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A) + β k3,   k3 = exp(ℓ_ref − ℓ_new) − (ℓ_ref − ℓ_new) − 1
    dual clip: where A < 0, the first term is at most delta·|A|

`token_losses` gives L for every token, and `aggregate` reduces it to a scalar. A micro-batch's loss is a sum over its
rows, divided by `Denominators`. These are counted over the whole batch of the step (all micro-batches, all processes)
before the first backward pass. So the gradient does not depend on how the batch is cut.

    grpo     Σ_rows (Σ w L / Σ w) / (rows with weight)
    bnpo     Σ w L / Σ w      defined per micro-batch; here the "micro-batch" is the whole batch of the step, so it
                              equals dapo. For TRL's form, use a micro-batch's own denominators and divide by the
                              accumulation steps.
    dapo     Σ w L / Σ w      over the whole batch of the step
    dr_grpo  Σ w L / (rows · max_length)
    gspo     level="sequence" with grpo: a row's ratio is exp(Σ w Δℓ / Σ w), clipped as a whole
    rtb      Σ w L / rows     with `balance`: a rollout's loss is the sum over its tokens, without a ratio
    gmpo     level="geometric" with grpo: as gspo, but each token's Δℓ is clipped before the mean: from above where
             A > 0, from below where A < 0

Without a ratio (`ratio=False`), L = −A ℓ_new + β k3 at every level.

Sources: GRPO arXiv 2402.03300, BNPO 2506.02864, DAPO 2503.14476, Dr. GRPO 2503.20783, GSPO 2507.18071, GMPO
2507.20673, dual clip 1912.09729.

B rows, L positions. `weight_BL` is 0 where a token is not scored; values there (even NaN) do not affect loss,
gradient or statistics.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unidiff.sequence import Modality

Level = Literal["token", "sequence", "segment", "geometric"]
LEVELS = ("token", "sequence", "segment", "geometric")
LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "rtb")  # ways to aggregate
# Losses by name: how tokens are aggregated, and which tokens share a ratio.
LOSSES: dict[str, tuple[str, Level]] = {name: (name, "token") for name in LOSS_TYPES}
LOSSES |= {"gspo": ("grpo", "sequence"), "gmpo": ("grpo", "geometric")}

# exp(20) is far outside any clip range, and its square is finite in float32. So a diverged policy gives a huge loss
# without gradient, not inf or NaN.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, eq=False)
class LossStats:
    """Sums over the scored tokens, so that statistics of micro-batches and processes add up exactly.

    sums_K: float64 [6], the token count and then `NAMES`. peak: float64 [], max |ρ − 1|. Both stay on the loss's
    device; only `means` synchronises with it.
    """

    NAMES = ("clip_low", "clip_high", "kl_old", "kl_ref", "ratio")

    sums_K: Tensor
    peak: Tensor

    def __add__(self, other: LossStats) -> LossStats:
        return LossStats(self.sums_K + other.sums_K, torch.maximum(self.peak, other.peak))

    @property
    def clipped(self) -> Tensor:
        """float64 []: the number of tokens whose ratio was clipped."""
        return self.sums_K[1] + self.sums_K[2]

    def means(self) -> dict[str, float]:
        """clip_low, clip_high: shares of clipped tokens. kl_old, kl_ref: k3 to the old and the reference policy, in
        nats per token. ratio: the mean. ratio_max_dev: max |ρ − 1|. tokens: their number. Zeros without tokens."""
        tokens, *sums = self.sums_K.tolist()
        means = {name: value / max(tokens, 1.0) for name, value in zip(self.NAMES, sums)}
        return means | {"ratio_max_dev": self.peak.item(), "tokens": tokens}


def added(total: dict[Modality, LossStats], stats: dict[Modality, LossStats]) -> dict[Modality, LossStats]:
    """Sums of each modality's statistics."""
    return {m: total[m] + s if m in total else s for m, s in stats.items()}


def check_finite(norm: Tensor, stats: Mapping[Modality, LossStats], when: str) -> None:
    """Raises FloatingPointError if a gradient's norm is not finite, so that it never reaches the weights. stats: of the
    differentiated losses, to name the modality at fault."""
    if math.isfinite(norm):
        return
    of = [m.name.lower() for m, s in stats.items() if not bool(s.sums_K.isfinite().all())]
    where = f"; values of {' and '.join(of)} tokens are not finite" if of else ""
    raise FloatingPointError(f"{when}: the gradient's norm is {float(norm)}{where}")


@dataclass(frozen=True)
class Denominators:
    """The denominators of a step's loss, counted over its whole batch.

    rows: rollouts. scored_rows: rollouts with any weight. weight: Σ w. max_length: maximum tokens of a rollout.
    Counts of micro-batches add up (`+`); over processes, sum-reduce `tensor()`.
    """

    rows: float
    scored_rows: float
    weight: float
    max_length: float

    @classmethod
    def of(cls, weight_BL: Tensor, max_length: float) -> Denominators:
        """The counts of some rows. Synchronises with the device."""
        row_B = weight_BL.double().sum(-1)
        scored, weight = torch.stack([(row_B > 0).sum().double(), row_B.sum()]).tolist()
        return cls(float(len(row_B)), scored, weight, float(max_length))

    def __add__(self, other: Denominators) -> Denominators:
        if self.max_length != other.max_length:
            raise ValueError(f"max_length differs: {self.max_length:g} and {other.max_length:g}")
        sums = self.rows + other.rows, self.scored_rows + other.scored_rows, self.weight + other.weight
        return Denominators(*sums, self.max_length)

    def tensor(self) -> Tensor:
        """float64 [3]: rows, scored_rows, weight; for a sum over processes."""
        return torch.tensor([self.rows, self.scored_rows, self.weight], dtype=torch.float64)

    @classmethod
    def from_tensor(cls, sums_3: Tensor, max_length: float) -> Denominators:
        """The inverse of `tensor`."""
        rows, scored_rows, weight = sums_3.tolist()
        return cls(rows, scored_rows, weight, float(max_length))


def token_losses(
    logp_new_BL: Tensor,
    logp_old_BL: Tensor,
    advantage: Tensor,
    weight_BL: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    beta: float = 0.0,
    logp_ref_BL: Tensor | None = None,
    level: Level = "token",
    segment_BL: Tensor | None = None,
    ratio: bool = True,
) -> tuple[Tensor, LossStats]:
    """The loss of every token, float32 [B, L], before multiplication by the weight; 0 where the weight is 0.

    logp_*_BL: log-probabilities of the sampled tokens in nats; only the new ones get a gradient.
    advantage: float [B] or [B, L]. weight_BL: bool or float ≥ 0.
    level: "token": each token has its own ratio; "sequence": the tokens of a row share the geometric mean
    exp(Σ w Δℓ / Σ w); "segment": the tokens of a segment share it, by `segment_BL` (int64, negative = no segment);
    "geometric": as "sequence", but each Δℓ is clipped first.
    ratio: False = the loss is −A ℓ_new, without level, clip range and delta; old values serve only for statistics.
    delta: dual clip, above 1 + epsilon_high; None = off. beta: weight of k3 against `logp_ref_BL`.
    """
    _check_options(delta, epsilon_high, beta, logp_ref_BL, level, segment_BL)
    scored_BL = weight_BL != 0
    weight_BL = weight_BL.float()
    advantage_BL = advantage if advantage.dim() == 2 else advantage[:, None]
    advantage_BL = torch.where(scored_BL, advantage_BL.float(), 0.0)

    change_BL = _difference(logp_new_BL, logp_old_BL.detach(), scored_BL)
    if level == "sequence":
        change_BL = _unit_mean(change_BL, weight_BL, torch.zeros_like(weight_BL, dtype=torch.int64), units=1)
    elif level == "segment":
        assert segment_BL is not None
        unit_BL = segment_BL.clamp(min=0)  # tokens without a segment have no weight
        change_BL = _unit_mean(change_BL, weight_BL, unit_BL, units=int(unit_BL.max()) + 1)
    ratio_BL = change_BL.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if not ratio:
        loss_BL = -advantage_BL * torch.where(scored_BL, _wide(logp_new_BL), 0.0)
    elif level == "geometric":
        loss_BL = -advantage_BL * _geometric_mean(change_BL, advantage_BL, weight_BL, epsilon_low, epsilon_high)
    else:
        clipped_BL = ratio_BL.clamp(1 - epsilon_low, 1 + epsilon_high)
        loss_BL = -torch.minimum(ratio_BL * advantage_BL, clipped_BL * advantage_BL)
    if ratio and delta is not None:
        loss_BL = torch.where(advantage_BL < 0, torch.minimum(loss_BL, -delta * advantage_BL), loss_BL)

    kl_ref_BL = torch.zeros_like(loss_BL)
    if logp_ref_BL is not None:
        kl_ref_BL = k3(logp_new_BL, logp_ref_BL.detach(), scored_BL)
        loss_BL = loss_BL + beta * kl_ref_BL
    # Without a ratio nothing is clipped.
    low_BL = (ratio_BL < 1 - epsilon_low) & (advantage_BL < 0) & ratio
    high_BL = (ratio_BL > 1 + epsilon_high) & (advantage_BL > 0) & ratio
    kl_old_BL = k3(logp_new_BL.detach(), logp_old_BL, scored_BL)
    stats = _stats(scored_BL, low_BL, high_BL, kl_old_BL, kl_ref_BL, ratio_BL)
    return torch.where(scored_BL, loss_BL, 0.0), stats


def k3(logp_BL: Tensor, other_BL: Tensor, scored_BL: Tensor) -> Tensor:
    """Schulman's estimate of KL(p‖other) at tokens drawn from p: exp(d) − d − 1 with d = other − logp.
    float32, ≥ 0. d is capped at 20, so that exp stays finite."""
    gap_BL = _difference(other_BL, logp_BL, scored_BL).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(gap_BL) - gap_BL


def aggregate(loss_BL: Tensor, weight_BL: Tensor, loss_type: str, denominators: Denominators) -> Tensor:
    """Reduces some rows' token losses to a scalar: a sum over the rows, divided by the whole step's denominators.

    The step's loss is the sum over its micro-batches and processes, so do not divide by the accumulation steps. If
    gradients are averaged over processes (DDP), multiply by the number of processes. Without any weight the result is
    0. Raises ValueError for an unknown loss type.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r}; choose one of {', '.join(LOSS_TYPES)}")
    weight_BL = weight_BL.float()
    row_B = (loss_BL * weight_BL).sum(-1)
    if loss_type == "grpo":
        total_B = weight_BL.sum(-1)
        return (row_B / torch.where(total_B > 0, total_B, 1.0)).sum() / max(denominators.scored_rows, 1.0)
    if loss_type == "rtb":
        return row_B.sum() / max(denominators.rows, 1.0)
    if loss_type == "dr_grpo":
        return row_B.sum() / max(denominators.rows * denominators.max_length, 1.0)
    return row_B.sum() / (denominators.weight or 1.0)


def modality_loss(
    logp_new_BL: Tensor,
    logp_old_BL: Tensor,
    advantage: Tensor,
    weight_BL: Tensor,
    modality_BL: Tensor,
    *,
    loss_type: str,
    denominators: Mapping[Modality, Denominators],
    weights: Mapping[Modality, float],
    without_ratio: Collection[Modality] = (),
    **options,
) -> tuple[Tensor, dict[Modality, LossStats]]:
    """Σ_m λ_m · (loss over modality m's tokens), so that 1,024 image tokens do not drown 60 text tokens.

    modality_BL: int64; positions with another value than a Modality are ignored. denominators, weights (λ): for every
    trained modality. without_ratio: modalities whose loss is −A ℓ_new. options: of `token_losses`; at level "sequence"
    a rollout has one ratio per modality.
    """
    total = logp_new_BL.new_zeros((), dtype=torch.float32)
    stats: dict[Modality, LossStats] = {}
    for modality, factor in weights.items():
        own_BL = torch.where(modality_BL == modality, weight_BL.float(), 0.0)
        own_options = {**options, "ratio": modality not in without_ratio}
        loss_BL, stats[modality] = token_losses(logp_new_BL, logp_old_BL, advantage, own_BL, **own_options)
        total = total + factor * aggregate(loss_BL, own_BL, loss_type, denominators[modality])
    return total, stats


def _difference(first_BL: Tensor, second_BL: Tensor, scored_BL: Tensor) -> Tensor:
    """first − second in float32 or wider at scored tokens, 0 elsewhere. Masked before the subtraction, because the
    gradient of a masked NaN would be 0 · NaN = NaN."""
    first_BL = torch.where(scored_BL, _wide(first_BL), 0.0)
    return first_BL - torch.where(scored_BL, _wide(second_BL), 0.0)


def _wide(values: Tensor) -> Tensor:
    """Casts to float32; float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _unit_mean(change_BL: Tensor, weight_BL: Tensor, unit_BL: Tensor, units: int) -> Tensor:
    """The weighted mean of the log-ratios over each unit of a row, copied to every token of the unit."""
    weight_BL = weight_BL.to(change_BL.dtype)
    zeros_BU = change_BL.new_zeros(len(change_BL), units)
    sum_BU = zeros_BU.scatter_add(1, unit_BL, change_BL * weight_BL)
    weight_BU = zeros_BU.scatter_add(1, unit_BL, weight_BL)
    return (sum_BU / torch.where(weight_BU > 0, weight_BU, 1.0)).gather(1, unit_BL)


def _geometric_mean(
    change_BL: Tensor, advantage_BL: Tensor, weight_BL: Tensor, epsilon_low: float, epsilon_high: float
) -> Tensor:
    """GMPO's ratio of each row, copied to every token: exp of the mean of clipped log-ratios. A log-ratio is at most
    log(1 + ε_high) where the advantage is positive, and at least log(1 − ε_low) where it is negative."""
    low = math.log(1 - epsilon_low) if epsilon_low < 1 else -MAX_LOG_RATIO
    change_BL = change_BL.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    clipped_BL = torch.where(advantage_BL < 0, change_BL.clamp(min=low), change_BL)
    clipped_BL = torch.where(advantage_BL > 0, change_BL.clamp(max=math.log1p(epsilon_high)), clipped_BL)
    return _unit_mean(clipped_BL, weight_BL, torch.zeros_like(weight_BL, dtype=torch.int64), units=1).exp()


@torch.no_grad()
def _stats(scored_BL: Tensor, *columns: Tensor) -> LossStats:
    """Sums of (low, high, kl_old, kl_ref, ratio) over the scored tokens, and the largest |ρ − 1|."""
    scored = scored_BL.double()
    sums = [scored.sum(), *((column.double() * scored).sum() for column in columns)]
    deviation_BL = torch.where(scored_BL, (columns[-1] - 1).abs(), 0.0).double()
    peak = deviation_BL.max() if deviation_BL.numel() else scored.sum()
    return LossStats(torch.stack(sums), peak)


def _check_options(
    delta: float | None,
    epsilon_high: float,
    beta: float,
    logp_ref_BL: Tensor | None,
    level: str,
    segment_BL: Tensor | None,
) -> None:
    if level not in LEVELS:
        raise ValueError(f"level={level!r}; choose one of {', '.join(LEVELS)}")
    if level == "segment" and segment_BL is None:
        raise ValueError("level='segment' needs segment_BL, the segment that each token is in")
    if delta is not None and delta <= 1 + epsilon_high:
        raise ValueError(f"delta={delta:g} must be above 1 + epsilon_high = {1 + epsilon_high:g}, or None")
    if beta and logp_ref_BL is None:
        raise ValueError(f"beta={beta:g} needs logp_ref_BL, the reference's log-probabilities")
