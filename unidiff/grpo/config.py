"""GRPOConfig: every setting of a run. The docstring is the reference; names are TRL's where the meaning is the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

from unidiff.config import FilePath, Unbounded
from unidiff.estimators import Estimator
from unidiff.estimators import parse as parse_estimator
from unidiff.sampling.config import SamplerConfig


@dataclass(frozen=True)
class GRPOConfig(SamplerConfig):
    """Settings of a GRPO run, and those of its rollouts (see SamplerConfig).

    Data
      num_prompts: prompts a step, over all processes. num_generations: rollouts of each prompt (the group, >= 2).
      seed: of prompts, rollouts and masks. rollout_parts: a step samples its prompts in so many parts, and judges one
      while it samples the next: for rewards that take long elsewhere. Changes speed, not results.
    Optimisation
      max_steps: steps; 0 = evaluate only. num_iterations: μ, passes over a step's rollouts, each with masks of its
      own. micro_batch_size: rows in one backward pass; changes memory and speed, not results. learning_rate,
      warmup_steps, lr_schedule (linear: down to 0 at max_steps; constant), adam_beta2, weight_decay, max_grad_norm
      (inf = gradients are not clipped). lora_rank: train adapters of this rank beside the frozen weights (0 = train
      the weights), with lora_alpha / lora_rank as their factor; there is no dropout in them, which would move ratios.
      gradient_checkpointing: compute activations twice instead of keeping them; changes memory and speed, not results.
    Objective
      loss_type: grpo, bnpo, dapo, dr_grpo, gspo, gmpo. epsilon, epsilon_high (None = epsilon): clip range. delta: dual
      clip, the cap of a loss with negative advantage, in advantages (None = off). beta: weight of the KL to the model
      at the start (0 = no reference is kept). text_weight, image_weight: λ of the modalities' losses. score_guidance:
      score guided rollouts with the same guidance, a forward pass more for each compared prompt; false = without, so
      that the policy that is trained is not the one that was sampled (metric guidance_ratio_max_dev).
    Credit
      assignment: joint, normalize_then_sum, factorized, segment. scale_rewards: group, batch, none.
      leave_one_out: a rollout's baseline leaves itself out.
    Estimators
      text_estimator, image_estimator: names in unidiff.estimators, with options as in "trace:merge=4". text_min_ratio,
      image_min_ratio: γ, smallest share of masked tokens, for estimators with a ladder of ratios.
    Run
      output_dir, resume (go on from the last checkpoint in output_dir; on the command line, with the settings of the
      run there, of which those that change speed or display alone may be given anew, and a larger max_steps),
      save_steps (0 = only at the end and when stopped), log_rollouts_every (steps between files in
      output_dir/rollouts, beside that of the first step: what the report and tools/edit_rollout.py show; 0 = none),
      eval_size, eval_split: held-out prompts of an evaluation, eval_steps: steps between greedy evaluations on the
      way (0 = only before and after).
      check_ratio_every: steps between checks that a row scores alone as in its micro-batch (0 = none).
      tracker: tensorboard, wandb, …. quiet: no live display.
    """

    # What a run may change when it goes on: how fast it is and what it shows, not what it learns.
    FREE: ClassVar[frozenset[str]] = frozenset(
        {"output_dir", "resume", "save_steps", "log_rollouts_every", "eval_steps", "check_ratio_every", "tracker"}
        | {"quiet", "micro_batch_size", "cache", "gradient_checkpointing", "rollout_parts"}
    )
    GROWS: ClassVar[str] = "max_steps"  # with lr_schedule linear, the rate then falls from where the longer run has it

    num_prompts: int = 8
    num_generations: int = 8
    rollout_parts: int = 1
    seed: int = 0

    max_steps: int = 80
    num_iterations: int = 1
    micro_batch_size: int = 8
    learning_rate: float = 2e-4
    warmup_steps: int = 4
    lr_schedule: Literal["linear", "constant"] = "linear"
    adam_beta2: float = 0.99
    weight_decay: float = 0.0
    max_grad_norm: Unbounded = 1.0
    lora_rank: int = 0
    lora_alpha: float = 64.0
    gradient_checkpointing: bool = False

    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "gmpo"] = "grpo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = 3.0
    beta: float = 0.0
    text_weight: float = 1.0
    image_weight: float = 1.0
    score_guidance: bool = True

    assignment: Literal["joint", "normalize_then_sum", "factorized", "segment"] = "factorized"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    leave_one_out: bool = False

    text_estimator: str = "fading_out"
    image_estimator: str = "image_random"
    text_min_ratio: float = 0.6
    image_min_ratio: float = 0.8

    output_dir: FilePath = "outputs/run"
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
        if self.greedy:
            raise ValueError(
                "greedy is true; greedy rollouts of a prompt are all the same, and there is nothing to learn"
            )
        if not self.text_temperature:
            raise ValueError("text_temperature is 0; the texts of a prompt's rollouts would all be the same")
        for name in ("num_prompts", "num_iterations", "micro_batch_size", "eval_size", "rollout_parts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        at_least_0 = (
            "max_steps",
            "warmup_steps",
            "save_steps",
            "log_rollouts_every",
            "eval_steps",
            "check_ratio_every",
            "lora_rank",
        )
        for name in (*at_least_0, "beta", "epsilon", "weight_decay", "text_weight", "image_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number that is not negative")
        for name in ("learning_rate", "max_grad_norm", "lora_alpha"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("text_min_ratio", "image_min_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        if self.epsilon_high is not None and self.epsilon_high < 0:
            raise ValueError(f"epsilon_high is {self.epsilon_high}; it must not be negative, or none for epsilon")
        if self.delta is not None and self.delta <= 1 + self.clip_range[1]:
            raise ValueError(f"delta is {self.delta}; it must be above 1 + epsilon_high, or none")
        self.estimators()

    @property
    def clip_range(self) -> tuple[float, float]:
        """ε below and above 1."""
        return self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high

    def estimators(self) -> tuple[Estimator, Estimator]:
        """Of text and of images. Raises ValueError for an option that does not exist or does not fit."""
        return (
            _estimator("text_estimator", self.text_estimator, self.text_min_ratio),
            _estimator("image_estimator", self.image_estimator, self.image_min_ratio),
        )

    def sampler(self, **changes: Any) -> SamplerConfig:
        """The settings of the rollouts alone."""
        own = {f.name: getattr(self, f.name) for f in fields(SamplerConfig)}
        return SamplerConfig(**{**own, **changes})

    def saves_rollouts(self, step: int) -> bool:
        """Whether the rollouts of a step (from 0) are written: of the first, and of every log_rollouts_every-th."""
        return bool(self.log_rollouts_every) and (step == 0 or (step + 1) % self.log_rollouts_every == 0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _estimator(field: str, text: str, min_ratio: float) -> Estimator:
    try:
        return parse_estimator(text, min_ratio)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
