"""Training all weights under DeepSpeed's ZeRO-2: the optimizer's state and its float32 weights are sharded.

ZeRO-2 exchanges gradients in every backward pass, but here processes make different numbers of passes. So an inner
iteration runs inside DeepSpeed's `coalesce_grad_reduction`: gradients add up on each process and are reduced once, in
the order of the parameters. Until then they are unsharded, as under FSDP2. Unlike FSDP2, they add up in the model's
dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from unidiff.grpo.distributed.whole import Whole
from unidiff.model import UnifiedModel


class Zero2(Whole):
    """The prepared model under ZeRO-2. Casts the weights to float32. DeepSpeed shards that copy and restores the model
    to its loaded dtype.

    Raises ValueError for adapters, a dtype or DeepSpeed settings that do not work here.
    """

    def __init__(self, model: UnifiedModel, accelerator: Accelerator, max_norm: float) -> None:
        super().__init__(model, accelerator)
        if not all(weight.requires_grad for weight in model.parameters()):
            raise ValueError(
                "adapters and frozen weights gain nothing from ZeRO-2, which would cast adapters to the model's dtype: "
                "use recipes/accelerate/8_gpu.yaml, or lora_rank 0"
            )
        if model.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the model is {model.dtype}; under ZeRO-2 load it in float32 or bfloat16")
        plugin: Any = accelerator.state.deepspeed_plugin
        settings = plugin.deepspeed_config
        zero = settings["zero_optimization"]
        placed = [zero.get(f"offload_{what}", {}).get("device", "none") for what in ("optimizer", "param")]
        if zero["stage"] != 2 or any(device not in ("none", None) for device in placed):
            raise ValueError(
                f"deepspeed_config: zero_stage is {zero['stage']}, offload devices are {placed[0]} and {placed[1]}; "
                "set zero_stage: 2 and both devices to none"
            )
        # The trainer cuts its own micro-batches; for DeepSpeed each update is one micro-batch.
        settings |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        settings |= {"gradient_clipping": max_norm, "bf16": {"enabled": model.dtype == torch.bfloat16}}
        for weight in model.parameters():
            weight.data = weight.data.float()

    def begin(self, policy: Any) -> None:
        if not hasattr(policy, "coalesce_grad_reduction"):
            raise ValueError('this DeepSpeed cannot keep gradients back: pip install "unidiff[deepspeed]"')
        self.engine = policy

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        with self.engine.coalesce_grad_reduction():
            yield
            for weight in self.model.parameters():  # or processes would reduce buckets of different parameters
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        self.engine.step()  # also clips and clears the gradients

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
