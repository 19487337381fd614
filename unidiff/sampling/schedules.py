"""Mask-ratio schedules κ(u): the share of tokens still masked at time u; κ(0) = 1, κ(1) = 0.

Step i of T goes from t = i/T to s = (i+1)/T.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Time = TypeVar("Time", float, Tensor)
Schedule = Callable[[Tensor], Tensor]
Annealing = Callable[[int, Tensor], Tensor]


def linear(u: Time) -> Time:
    """κ(u) = 1 − u: the same number of tokens in every step."""
    return 1.0 - u


def cosine(u: Time) -> Time:
    """κ(u) = cos(πu/2): few tokens first, many at the end. Source: MaskGIT (arXiv 2202.04200), §3.3."""
    return torch.cos(u * (math.pi / 2)) if isinstance(u, Tensor) else math.cos(u * (math.pi / 2))


SCHEDULES: dict[str, Schedule] = {"linear": linear, "cosine": cosine}


# Annealing of MaskGIT's noise: the factor on its temperature in step i of T, s = (i+1)/T; [B] float64. "cumulative" is
# MMaDA's, which multiplies the temperature by 1 - s again in every step; "constant" is Lumina-DiMOO's.
ANNEALING: dict[str, Annealing] = {
    "linear": lambda i, steps_B: 1 - _reached(i, steps_B),
    "cumulative": lambda i, steps_B: torch.stack([1 - _reached(j, steps_B) for j in range(i + 1)]).prod(0),
    "constant": lambda i, steps_B: torch.ones_like(steps_B, dtype=torch.float64),
}


def _reached(i: int, steps_B: Tensor) -> Tensor:
    return ((i + 1) / steps_B.double()).clamp(max=1.0)
