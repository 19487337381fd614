"""unidiff: reinforcement learning of unified masked discrete diffusion models.

The names below are imported at first use. So `import unidiff` does not load torch or transformers, and sampling does
not load the trainer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOME = {
    "GRPOConfig": "unidiff.grpo.config",
    "GRPOTrainer": "unidiff.grpo.trainer",
    "InterleavedSampler": "unidiff.sampling.sampler",
    "RewardRouter": "unidiff.rewards.router",
    "SamplerConfig": "unidiff.sampling.config",
    "UnifiedModel": "unidiff.model",
    "evaluate": "unidiff.grpo.evaluation",
    "reward": "unidiff.rewards.reward",
    "rollout": "unidiff.sampling.sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'unidiff' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
