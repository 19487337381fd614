"""GRPOConfig: every setting of a run. Names are TRL's where the meaning is the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

from unidiff.config import FilePath, Unbounded, setting
from unidiff.estimators import Estimator
from unidiff.estimators import parse as parse_estimator
from unidiff.sampling.config import SamplerConfig
from unidiff.schedules import make_schedule


@dataclass(frozen=True)
class GRPOConfig(SamplerConfig):
    """Settings of a GRPO run and of its rollouts, checked together.

    Raises ValueError, with the field's name, for a value of another type or out of range.
    """

    # Settings that a resumed run may change: they affect speed and output, not what is learned.
    FREE: ClassVar[frozenset[str]] = frozenset(
        {"output_dir", "resume", "save_steps", "log_rollouts_every", "eval_steps", "check_ratio_every", "tracker"}
        | {"quiet", "micro_batch_size", "cache", "gradient_checkpointing", "compile", "rollout_parts"}
    )
    # A resumed run may also have more steps. Unless lr_schedule is constant, its rate then follows the longer schedule.
    GROWS: ClassVar[str] = "max_steps"

    num_prompts: int = setting("data", 8, "prompts of a step, over all processes")
    num_generations: int = setting("data", 8, "rollouts of each prompt (the group), at least 2")
    rollout_parts: int = setting(
        "data",
        1,
        "sample a step's prompts in this many parts, and judge one while the next is sampled; changes speed only",
    )
    refill_groups: int = setting(
        "data", 0, "times that prompts whose rollouts all earned the same are replaced by others, at most; 0 = kept"
    )
    seed: int = setting("data", 0, "of prompts, rollouts and masks")

    max_steps: int = setting("optimizer", 80, "optimizer steps are max_steps x num_iterations; 0 = evaluate only")
    num_iterations: int = setting("optimizer", 1, "passes over a step's rollouts (mu), each with its own masks")
    micro_batch_size: int = setting("optimizer", 8, "rows of one backward pass; changes memory and speed only")
    learning_rate: float = setting("optimizer", 2e-4, "of AdamW")
    warmup_steps: int = setting("optimizer", 4, "steps over which the rate rises linearly")
    lr_schedule: Literal["linear", "cosine", "constant"] = setting(
        "optimizer", "linear", "linear and cosine = down to 0 at max_steps"
    )
    adam_beta2: float = setting("optimizer", 0.99, "second moment's decay of AdamW")
    weight_decay: float = setting("optimizer", 0.0, "of AdamW")
    max_grad_norm: Unbounded = setting("optimizer", 1.0, "clip the gradient's norm to this; .inf = do not clip")
    lora_rank: int = setting(
        "optimizer", 0, "train adapters of this rank beside the frozen weights, without dropout; 0 = train the weights"
    )
    lora_alpha: float = setting("optimizer", 64.0, "adapters are scaled by lora_alpha / lora_rank")
    gradient_checkpointing: bool = setting(
        "optimizer", False, "compute activations twice instead of keeping them; changes memory and speed only"
    )
    compile: bool = setting(
        "optimizer", False, "torch.compile the body's layers: a minute at the start; results round differently"
    )

    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "gmpo", "rtb"] = setting(
        "loss", "grpo", "how token losses are formed and averaged; rtb = relative trajectory balance"
    )
    epsilon: float = setting("loss", 0.2, "importance ratios are clipped to [1 - epsilon, 1 + epsilon_high]")
    epsilon_high: float | None = setting("loss", None, "none = epsilon")
    delta: float | None = setting(
        "loss",
        3.0,
        "dual clip: caps the loss of a token with negative advantage at delta times its advantage; none = off",
    )
    beta: float = setting(
        "loss",
        0.0,
        "weight of the KL to the reference policy, the model at the start; 0 = no reference; of rtb the temperature",
    )
    sync_ref_every: int = setting(
        "loss",
        0,
        "steps between which the reference becomes the policy of then; 0 = it stays the model at the start",
    )
    importance_cap: float | None = setting(
        "loss",
        None,
        "weigh a token's policy loss by the old policy's probability of it, as estimated, over that when it was drawn, "
        "at most this; for approximate rollouts with trace, and for two_times; none = do not",
    )
    text_weight: float = setting("loss", 1.0, "weight of the text tokens' loss")
    image_weight: float = setting("loss", 1.0, "weight of the image tokens' loss")
    score_guidance: bool = setting(
        "loss", True, "score guided rollouts with the same guidance; false = without (see guidance_ratio_max_dev)"
    )

    assignment: Literal["joint", "normalize_then_sum", "factorized", "segment"] = setting(
        "loss", "factorized", "which tokens a reward's advantage goes to"
    )
    scale_rewards: Literal["group", "batch", "none"] = setting(
        "loss", "group", "what centred rewards are divided by: the standard deviation of the group, of the batch, or 1"
    )
    mask_truncated_completions: bool = setting(
        "loss", False, "texts that were cut off, without an end token, are judged but not trained"
    )
    leave_one_out: bool = setting("loss", False, "a rollout's baseline is the mean of the other rollouts of its group")

    text_estimator: str = setting(
        "estimator",
        "fading_out",
        "log-probabilities of text: a name, with options as in trace:merge=4 (docs/estimators.md)",
    )
    image_estimator: str = setting("estimator", "image_random", "log-probabilities of pictures")
    text_min_ratio: float = setting(
        "estimator", 0.6, "smallest share of masked text tokens (gamma), for estimators with a ladder of ratios"
    )
    image_min_ratio: float = setting("estimator", 0.8, "smallest share of masked image tokens")

    schedule: str | None = setting(
        "schedule",
        None,
        "train a policy that steers each step of a rollout: a name, with options as in controls:temperature=no "
        "(docs/schedules.md); none = the settings, or the schedule that the model has, as it is",
    )
    schedule_turns: Literal["together", "alternate", "alone"] = setting(
        "schedule",
        "together",
        "train model and schedule in each step, by turns (the model first), or the schedule alone",
    )
    schedule_speed: float = setting(
        "schedule",
        0.0,
        "multiply rewards above 0 by 1 - this where each token took its own step, and by 1 where each segment took one",
    )
    schedule_speed_adds: bool = setting(
        "schedule", False, "subtract it from every reward instead: a form that is learnt to be hacked, to compare"
    )
    schedule_learning_rate: float = setting("schedule", 3e-3, "of Adam, for the schedule")

    output_dir: FilePath = setting("run", "outputs/run", "folder of the run")
    resume: bool = setting("run", False, "go on from the last checkpoint in output_dir, with the settings there")
    save_steps: int = setting("run", 10, "steps between checkpoints; 0 = only at the end and when stopped")
    log_rollouts_every: int = setting(
        "run", 20, "steps between files of rollouts, beside that of the first step; 0 = none"
    )
    eval_size: int = setting("data", 256, "held-out prompts of an evaluation")
    eval_split: str = setting("data", "test", "split that evaluations use")
    eval_steps: int = setting("run", 0, "steps between greedy evaluations on the way; 0 = only before and after")
    check_ratio_every: int = setting(
        "run", 10, "steps between checks that a row scores alone as in its micro-batch; 0 = none"
    )
    tracker: str | None = setting("run", None, "tensorboard, wandb, ...; none = metrics.jsonl alone")
    quiet: bool = setting("run", False, "no live display")

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
            "refill_groups",
            "sync_ref_every",
            "lora_rank",
        )
        for name in (*at_least_0, "beta", "epsilon", "weight_decay", "text_weight", "image_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number that is not negative")
        for name in ("learning_rate", "max_grad_norm", "lora_alpha", "schedule_learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("text_min_ratio", "image_min_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")
        if not 0 <= self.adam_beta2 < 1:
            raise ValueError(f"adam_beta2 is {self.adam_beta2}; it must be at least 0 and below 1")
        if self.epsilon_high is not None and self.epsilon_high < 0:
            raise ValueError(f"epsilon_high is {self.epsilon_high}; it must not be negative, or none for epsilon")
        if self.delta is not None and self.delta <= 1 + self.clip_range[1]:
            raise ValueError(f"delta is {self.delta}; it must be above 1 + epsilon_high, or none")
        if self.importance_cap is not None and self.importance_cap <= 0:
            raise ValueError(f"importance_cap is {self.importance_cap}; it must be above 0, 1 is usual, or none")
        for name, estimator in zip(("text_estimator", "image_estimator"), self.estimators()):
            if self.importance_cap is not None and not estimator.by_token:
                raise ValueError(f"importance_cap needs a probability of each token; {name} does not estimate it")
        if self.schedule_speed < 0 or (self.schedule_speed > 1 and not self.schedule_speed_adds):
            raise ValueError(f"schedule_speed is {self.schedule_speed}; a share of the reward is in [0, 1]")
        if self.schedule is not None:
            make_schedule(self.schedule)
        self._check_rtb(*self.estimators())

    def _check_rtb(self, *estimators: Estimator) -> None:
        """Checks the settings that rtb needs: its loss has one advantage per rollout, in the rewards' own unit."""
        if self.loss_type != "rtb":
            return
        if not self.beta:
            raise ValueError("beta is 0; loss_type rtb needs its temperature, above 0: small = near the best reward")
        needs = {"scale_rewards": "none", "assignment": "joint", "leave_one_out": False, "importance_cap": None}
        needs |= {"mask_truncated_completions": False}
        for name, value in (needs | {"text_weight": 1.0, "image_weight": 1.0}).items():
            if getattr(self, name) != value:
                shown = str(value).lower()
                raise ValueError(f"{name} is {getattr(self, name)}; loss_type rtb, of whole rollouts, needs {shown}")
        for name, estimator in zip(("text_estimator", "image_estimator"), estimators):
            if not estimator.joint or not estimator.ratio:
                raise ValueError(
                    f"{name}: its values do not sum to a log-probability of the segment; loss_type rtb needs trace, "
                    "left_to_right or elbo"
                )

    @property
    def clip_range(self) -> tuple[float, float]:
        """(ε_low, ε_high) of the importance ratio's clip range."""
        return self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high

    def estimators(self) -> tuple[Estimator, Estimator]:
        """The estimators of texts and of images. Raises ValueError for an option that is unknown or does not fit."""
        return (
            _estimator("text_estimator", self.text_estimator, self.text_min_ratio),
            _estimator("image_estimator", self.image_estimator, self.image_min_ratio),
        )

    def sampler(self, **changes: Any) -> SamplerConfig:
        """The sampler's settings, with `changes`."""
        own = {f.name: getattr(self, f.name) for f in fields(SamplerConfig)}
        return SamplerConfig(**{**own, **changes})

    def saves_rollouts(self, step: int) -> bool:
        """Whether a step's rollouts (steps count from 0) are saved: the first step, and every log_rollouts_every-th."""
        return bool(self.log_rollouts_every) and (step == 0 or (step + 1) % self.log_rollouts_every == 0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _estimator(field: str, text: str, min_ratio: float) -> Estimator:
    try:
        return parse_estimator(text, min_ratio)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
