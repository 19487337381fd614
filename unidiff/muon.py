"""Muon: momentum orthogonalised by Newton-Schulz (Keller Jordan, 2024, kellerjordan.github.io/posts/muon).

torch.optim.Muon does the same in bfloat16, one matrix at a time. On a CPU that takes twice as long as a whole training
step of the small native model. This one works in the parameters' dtype and batches matrices of the same shape.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315  # quintic iteration that pushes singular values towards 1


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """[M, r, c] -> nearly orthogonal matrices of the same shape."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; for the matrices of a transformer's blocks. lr: spectral norm of a step.
    weight_decay: decoupled, as in AdamW: a step multiplies the matrices by 1 − lr · weight_decay."""

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon takes matrices, got a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = [self._momentum(p, group["momentum"]) for p in params]
                keep = 1 - group["lr"] * group["weight_decay"]
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonalised(torch.stack(updates))):
                    p.mul_(keep).add_(update, alpha=-scale)

    def _momentum(self, p: Tensor, momentum: float) -> Tensor:
        assert p.grad is not None
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        buffer = state["momentum"]
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)
