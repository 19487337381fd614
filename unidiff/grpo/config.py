"""GRPOConfig: every setting of a run. The docstring is the reference; names are TRL's where the meaning is the same."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from unidiff.estimators import ESTIMATORS
from unidiff.sampling.rollout import SamplerConfig

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "gspo")


@dataclass(frozen=True)
class GRPOConfig(SamplerConfig):
    """Settings of a GRPO run, and those of its rollouts (see SamplerConfig).

    Data
      num_prompts: prompts a step, over all processes. num_generations: rollouts of each prompt (the group, >= 2).
      seed: of prompts, rollouts and masks.
    Optimisation
      max_steps: steps; 0 = evaluate only. num_iterations: μ, passes over a step's rollouts, each with masks of its
      own. micro_batch_size: rows in one backward pass; changes memory and speed, not results. learning_rate,
      warmup_steps, lr_schedule (linear: down to 0 at max_steps; constant), adam_beta2, weight_decay, max_grad_norm.
    Objective
      loss_type: grpo, bnpo, dapo, dr_grpo, gspo. epsilon, epsilon_high (None = epsilon): clip range. delta: dual clip,
      the cap of a loss with negative advantage, in advantages (None = off). beta: weight of the KL to the model at
      the start (0 = no reference is kept). text_weight, image_weight: λ of the modalities' losses.
    Credit
      assignment: joint, normalize_then_sum, factorized, segment. scale_rewards: group, batch, none.
      leave_one_out: a rollout's baseline leaves itself out.
    Estimators
      text_estimator, image_estimator: names in unidiff.estimators. text_min_ratio, image_min_ratio: γ, smallest share
      of masked tokens, for estimators with a ladder of ratios.
    Run
      output_dir, resume (go on from the last checkpoint in output_dir), save_steps (0 = only at the end and when
      stopped), log_rollouts_every (steps between galleries of the report; 0 = none), eval_size: held-out prompts of an evaluation,
      eval_split, eval_steps: evaluate every so many steps too (0 = only before and after). check_ratio_every: steps
      between measurements of the first-iteration ratio when num_iterations is 1. tracker: tensorboard, wandb, ….
      quiet: no live display.
    """

    num_prompts: int = 8
    num_generations: int = 8
    seed: int = 0

    max_steps: int = 40
    num_iterations: int = 1
    micro_batch_size: int = 16
    learning_rate: float = 5e-4
    warmup_steps: int = 4
    lr_schedule: Literal["linear", "constant"] = "linear"
    adam_beta2: float = 0.99
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo", "gspo"] = "grpo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = 3.0
    beta: float = 0.0
    text_weight: float = 1.0
    image_weight: float = 1.0

    assignment: Literal["joint", "normalize_then_sum", "factorized", "segment"] = "factorized"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    leave_one_out: bool = False

    text_estimator: str = "fading_out"
    image_estimator: str = "image_random"
    text_min_ratio: float = 0.6
    image_min_ratio: float = 0.8

    output_dir: str = "outputs/run"
    resume: bool = False
    save_steps: int = 10
    log_rollouts_every: int = 20
    eval_size: int = 256
    eval_split: str = "test"
    eval_steps: int = 0
    check_ratio_every: int = 10
    tracker: str | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations is {self.num_generations}; a group needs at least 2 rollouts to compare, 8 is usual"
            )
        for name in ("num_prompts", "num_iterations", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_steps", "warmup_steps", "save_steps", "log_rollouts_every", "eval_size", "beta"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        for name in ("text_estimator", "image_estimator"):
            if getattr(self, name) not in ESTIMATORS:
                nearest = difflib.get_close_matches(getattr(self, name), ESTIMATORS, 1, 0.0)[0]
                raise ValueError(f"{name} is {getattr(self, name)!r}; did you mean {nearest!r}?")
        for name in ("text_min_ratio", "image_min_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        if self.delta is not None and self.delta <= 1 + (self.epsilon_high or self.epsilon):
            raise ValueError(f"delta is {self.delta}; it must be above 1 + epsilon, or none")

    def sampler(self, **changes: Any) -> SamplerConfig:
        """The settings of the rollouts alone."""
        own = {f.name: getattr(self, f.name) for f in fields(SamplerConfig)}
        return SamplerConfig(**{**own, **changes})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def trained_as(self) -> dict[str, Any]:
        """The settings that change a run's numbers: two runs may be joined by `resume` only if these agree."""
        free = {"output_dir", "resume", "save_steps", "log_rollouts_every", "eval_steps", "tracker", "quiet"}
        free |= {"eval_size", "eval_split", "check_ratio_every", "micro_batch_size", "cache"}
        return {k: v for k, v in self.to_dict().items() if k not in free}
