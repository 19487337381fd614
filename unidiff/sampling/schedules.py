"""Mask-ratio schedules κ: the share of tokens that are still masked at time u, κ(0) = 1, κ(1) = 0.

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


def linear(u: Time) -> Time:
    """κ(u) = 1 − u: the same number of tokens in every step."""
    return 1.0 - u


def cosine(u: Time) -> Time:
    """κ(u) = cos(πu/2): few tokens first, many at the end. Source: MaskGIT (arXiv 2202.04200), §3.3."""
    return torch.cos(u * (math.pi / 2)) if isinstance(u, Tensor) else math.cos(u * (math.pi / 2))


SCHEDULES: dict[str, Schedule] = {"linear": linear, "cosine": cosine}
