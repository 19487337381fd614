"""The reference policy of the KL term."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from unidiff.grpo import lora
from unidiff.model import UnifiedModel


class Reference:
    """The policy at the start, or at the last call of `follow`.

    It is a frozen copy of the model. With fresh adapters no copy is needed: the reference is the model with its
    adapters switched off, and after `follow` the model with a saved set of adapters. Checkpoints hold its `state_dict`.
    """

    def __init__(self, policy: UnifiedModel, fresh_adapters: bool) -> None:
        self.policy = policy
        self.copy = None if fresh_adapters else copy.deepcopy(policy).requires_grad_(False)
        self.adapters: list[Tensor] | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[UnifiedModel]:
        """Yields a model that is the reference while the context is open."""
        if self.copy is not None:
            yield self.copy
        elif self.adapters is None:
            with lora.switched_off(self.policy) as model:
                yield model
        else:
            self._swap()
            try:
                yield self.policy
            finally:
                self._swap()

    @torch.no_grad()
    def follow(self) -> None:
        """Sets the reference to the current policy."""
        if self.copy is not None:
            self.copy.load_state_dict(self.policy.state_dict())
        else:
            self.adapters = [p.detach().clone() for p in lora.trained(self.policy)]

    def _swap(self) -> None:
        """Swaps the adapters of the policy and of the reference."""
        assert self.adapters is not None
        for i, p in enumerate(lora.trained(self.policy)):
            p.data, self.adapters[i] = self.adapters[i], p.data

    def state_dict(self) -> dict[str, Any]:
        return {"copy": None if self.copy is None else self.copy.state_dict(), "adapters": self.adapters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.copy is not None:
            self.copy.load_state_dict(state["copy"])
        elif state["adapters"] is not None:
            device = self.policy.device
            self.adapters = [p.to(device) for p in state["adapters"]]
