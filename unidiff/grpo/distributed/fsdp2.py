"""Weights sharded by FSDP2. See `unidiff.grpo.distributed`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    register_fsdp_forward_method,
)

from unidiff.grpo.distributed.whole import Whole
from unidiff.model import UnifiedModel


class FSDP2(Whole):
    """The prepared model's shards. Casts trained weights to float32 or wider.

    Raises ValueError for FSDP settings that do not work here.
    """

    def __init__(self, model: UnifiedModel, accelerator: Accelerator) -> None:
        super().__init__(model, accelerator)
        self.shell = _shell(model)
        plugin: Any = accelerator.state.fsdp_plugin
        offload = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
        if offload or plugin.cpu_ram_efficient_loading or plugin.activation_checkpointing:
            raise ValueError(
                "fsdp_config: fsdp_offload_params, fsdp_cpu_ram_efficient_loading and fsdp_activation_checkpointing "
                "must be false (for the last there is the setting gradient_checkpointing)"
            )
        # Do not cast inputs: rotary embedding needs float32 cosines whatever the weights' dtype is.
        wide = torch.promote_types(model.dtype, torch.float32)
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=model.dtype, reduce_dtype=wide, cast_forward_inputs=False
        )
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.to(wide)

    def begin(self, policy: Any) -> None:
        """Gathers the weights for the first time."""
        # FSDP needs a call of the root before its parts; an empty context is the cheapest one.
        register_fsdp_forward_method(self.model, "begin")  # type: ignore[arg-type]
        self.model.begin(0)
        self._gather()

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """While open, parameters are shards."""
        for part in self._parts():
            part.reshard()
        yield
        self._gather()

    def whole(self) -> UnifiedModel:
        """A copy of the model with all weights, in the loaded dtype."""
        with self.apart():
            weights: Any = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            as_loaded = {name: weight.dtype for name, weight in self.shell.state_dict().items()}
            self.shell.load_state_dict({k: w.to(as_loaded[k]) for k, w in weights.items()}, assign=True)
        return self.shell

    def _gather(self) -> None:
        for part in self._parts():
            part.set_reshard_after_forward(False, recurse=False)
            part.set_reshard_after_backward(False, recurse=False)
            part.unshard()

    def _parts(self) -> list[Any]:
        return [m for m in self.model.modules() if isinstance(m, FSDPModule)]


def _shell(model: UnifiedModel) -> UnifiedModel:
    """A copy whose weights are on the meta device."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, {**empty, id(model.images): model.images, id(model.tokenizer): model.tokenizer})
