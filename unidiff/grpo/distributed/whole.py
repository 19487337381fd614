"""Unsharded weights: one process, or DDP. Also the interface of the sharded kinds."""

from __future__ import annotations

import contextlib
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from unidiff.model import UnifiedModel


class Whole:
    """The prepared model's weights on this process. Created before the optimizer.

    In every subclass, weights are complete outside of `apart`.
    """

    def __init__(self, model: UnifiedModel, accelerator: Accelerator) -> None:
        self.model, self.accelerator = model, accelerator

    def begin(self, policy: Any) -> None:
        """Called once after `Accelerator.prepare`. policy: what it returned."""
        if isinstance(policy, DistributedDataParallel):
            # Buffers are constants, the same on every process. DDP would send them with some of the forward passes, and
            # processes whose micro-batches have different numbers of passes would exchange things in different orders.
            policy.broadcast_buffers = False

    def collected(self) -> contextlib.AbstractContextManager[None]:
        """Wraps all forward and backward passes of one optimizer step."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Replaces `Accelerator.backward`."""
        self.accelerator.backward(loss)

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """While open, parameters are in the form that the optimizer, clipping and checkpoints need."""
        return contextlib.nullcontext()

    def whole(self) -> UnifiedModel:
        """The complete model, for the main process to save. Called by every process."""
        return self.model
