"""unidiff: reinforcement learning of unified masked discrete diffusion models."""

from unidiff.grpo.config import GRPOConfig
from unidiff.grpo.evaluation import evaluate
from unidiff.grpo.trainer import GRPOTrainer
from unidiff.model import UnifiedModel
from unidiff.rewards.reward import reward
from unidiff.rewards.router import RewardRouter
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.sampler import InterleavedSampler, rollout

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "InterleavedSampler",
    "RewardRouter",
    "SamplerConfig",
    "UnifiedModel",
    "evaluate",
    "reward",
    "rollout",
]
