"""Measures the peak tensor memory of a piece of code, on any device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors created inside the `with` block, including those that autograd keeps.

    peak: the maximum alive at once, without temporary memory inside single operations. It is slow: do not measure time
    inside it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in _pytree.tree_leaves(out):
            # A view shares its base's storage, which is counted already.
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if size and place not in self._known:
            self._known.add(place)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.alive -= size
