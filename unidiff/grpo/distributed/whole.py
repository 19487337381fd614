"""Weights that are whole on every process: one process, or DDP. The interface of the ways to share them out."""

from __future__ import annotations

import contextlib
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from unidiff.model import UnifiedModel


class Whole:
    """The prepared model's weights on this process. Made before the optimizer.

    Weights are whole outside of `apart`, in every subclass.
    """

    def __init__(self, model: UnifiedModel, accelerator: Accelerator) -> None:
        self.model, self.accelerator = model, accelerator

    def begin(self, policy: Any) -> None:
        """Called once after `Accelerator.prepare`, which returned the policy."""
        if isinstance(policy, DistributedDataParallel):
            # Buffers are constants, the same on every process. DDP would send them with some of the forward passes, and
            # processes whose micro-batches have different numbers of passes would exchange things in different orders.
            policy.broadcast_buffers = False

    def collected(self) -> contextlib.AbstractContextManager[None]:
        """Around all forward and backward passes of one step of the optimizer."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """In place of `Accelerator.backward`."""
        self.accelerator.backward(loss)

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """Inside, parameters are what the optimizer, clipping and checkpoints work on."""
        return contextlib.nullcontext()

    def whole(self) -> UnifiedModel:
        """The model as one piece, to be saved by the main process. Called by every process."""
        return self.model
