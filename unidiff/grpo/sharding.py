"""Training on several processes: which ways work, and weights sharded by FSDP2.

Under FSDP2 the float32 weights, their gradients and the optimizer's state are shared out among the processes; the
weights that the model computes with are whole on each of them, in the dtype that it was loaded in, and put together
again after each update. Nothing is exchanged in between: rollouts take as many passes as they need on each process, and
gradients meet once, in the last backward pass of an update, as without sharding. DeepSpeed's second stage is made to do
the same (zero2).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from unidiff.model import UnifiedModel

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
_WORKING = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, *_SHARDED)


def shards(model: UnifiedModel, accelerator: Accelerator, max_norm: float) -> Shards:
    """What the accelerator's way of training asks for. max_norm: gradients are clipped to it."""
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        from unidiff.grpo.zero2 import Zero2

        return Zero2(model, accelerator, max_norm)
    return Shards(model, accelerator)


def check(accelerator: Accelerator) -> None:
    """Raises ValueError for a way of training on several processes that would go wrong."""
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


class Shards:
    """The prepared model's shards under FSDP2; without it, nothing, and every method does nothing.

    Weights are whole outside of `apart`. Made before the optimizer: `ready` raises trained weights to float32 at least.
    """

    def __init__(self, model: UnifiedModel, accelerator: Accelerator) -> None:
        self.model, self.accelerator = model, accelerator
        self.on = accelerator.distributed_type is DistributedType.FSDP
        self.shell: UnifiedModel | None = None
        if not self.on:
            return
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

        self.shell = _shell(model)
        plugin: Any = accelerator.state.fsdp_plugin
        offload = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
        if offload or plugin.cpu_ram_efficient_loading or plugin.activation_checkpointing:
            raise ValueError(
                "fsdp_config: fsdp_offload_params, fsdp_cpu_ram_efficient_loading and fsdp_activation_checkpointing "
                "must be false (for the last there is the setting gradient_checkpointing)"
            )
        # Inputs are not cast: rotary embedding takes float32 cosines whatever the weights' dtype is.
        wide = torch.promote_types(model.dtype, torch.float32)
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=model.dtype, reduce_dtype=wide, cast_forward_inputs=False
        )
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.to(wide)

    def begin(self, policy: Any) -> None:
        """After `Accelerator.prepare`, which made the policy: puts the weights together for the first time."""
        if self.on:
            from torch.distributed.fsdp import register_fsdp_forward_method

            # The root has to run before its parts do; an empty context is the least that can run.
            register_fsdp_forward_method(self.model, "begin")  # type: ignore[arg-type]
            self.model.begin(0)
            self._gather()

    def _gather(self) -> None:
        for part in self._parts():
            part.set_reshard_after_forward(False, recurse=False)
            part.set_reshard_after_backward(False, recurse=False)
            part.unshard()

    def collected(self) -> contextlib.AbstractContextManager[None]:
        """Around all forward and backward passes of one step of the optimizer."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """In place of `Accelerator.backward`."""
        self.accelerator.backward(loss)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, parameters are the shards that the optimizer, clipping and checkpoints work on."""
        for part in self._parts():
            part.reshard()
        yield
        if self.on:
            self._gather()

    def whole(self, accelerator: Accelerator) -> UnifiedModel:
        """The model as one piece, to be saved by the main process; called by all of them."""
        if self.shell is None:
            return self.model
        with self.apart():
            weights: Any = accelerator.get_state_dict(self.model)
        if accelerator.is_main_process:
            as_loaded = {name: weight.dtype for name, weight in self.shell.state_dict().items()}
            self.shell.load_state_dict({k: w.to(as_loaded[k]) for k, w in weights.items()}, assign=True)
        return self.shell

    def _parts(self) -> list[Any]:
        if not self.on:
            return []
        from torch.distributed.fsdp import FSDPModule

        return [m for m in self.model.modules() if isinstance(m, FSDPModule)]


def _shell(model: UnifiedModel) -> UnifiedModel:
    """A copy without weights."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, {**empty, id(model.images): model.images, id(model.tokenizer): model.tokenizer})
