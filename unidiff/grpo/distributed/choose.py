"""Chooses the kind of sharding that an accelerator asks for."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType

from unidiff.grpo.distributed.whole import Whole
from unidiff.model import UnifiedModel

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
_WORKING = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, *_SHARDED)


def check(accelerator: Accelerator) -> None:
    """Raises ValueError for a distributed setting that does not work here."""
    kind = accelerator.distributed_type
    if kind not in _WORKING:
        raise ValueError(
            f"distributed_type is {kind.value}, which is not supported: processes make different numbers of backward "
            "passes here, and would wait for one another for ever. Use FSDP version 2 "
            "(recipes/accelerate/8_gpu_fsdp2.yaml)"
        )
    if kind is DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("fsdp_version is 1, which is not supported; set fsdp_version: 2")
    if kind in _SHARDED and accelerator.mixed_precision != "no":
        raise ValueError(
            f"mixed_precision is {accelerator.mixed_precision!r}, but weights are computed with in the dtype that they "
            "were loaded in, under FSDP too: set mixed_precision: 'no', and the dtype of the model"
        )


def weights_for(model: UnifiedModel, accelerator: Accelerator, max_norm: float) -> Whole:
    """The object that manages the model's weights on this process. max_norm: gradients are clipped to it."""
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        from unidiff.grpo.distributed.zero2 import Zero2

        return Zero2(model, accelerator, max_norm)
    if accelerator.distributed_type is DistributedType.FSDP:
        from unidiff.grpo.distributed.fsdp2 import FSDP2

        return FSDP2(model, accelerator)
    return Whole(model, accelerator)
