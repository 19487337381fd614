"""Unsharded weights: one process, or DDP. Also the interface of the sharded kinds."""

from __future__ import annotations

import contextlib
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from unidiff.model import UnifiedModel


class Whole:
    """The prepared model's weights on this process. Created before the optimizer.

    In every subclass, weights are complete outside of `apart`.
    """

    def __init__(self, model: UnifiedModel, accelerator: Accelerator) -> None:
        self.model, self.accelerator = model, accelerator

    def begin(self, policy: Any) -> None:
        """Called once after `Accelerator.prepare`. policy: what it returned."""

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
