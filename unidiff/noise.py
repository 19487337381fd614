"""Counter-based random numbers: every number is a pure function of a key and a counter.

A row's noise depends only on its own key, made of (seed, step, prompt, sample). It does not depend on the row's batch,
padding or process, or on earlier draws. There is no generator state, so resuming needs no saved state, and the global
RNG does not change.

The generator is SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014),
vectorised over tensors of keys. It needs arithmetic modulo 2**64; int64 wraps around accordingly.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _signed(x: int) -> int:
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >= 1 << 63 else x


def _mix(x: Tensor) -> Tensor:
    # >> on int64 copies the sign; the masks make it a logical shift.
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _mix_int(x: int) -> int:
    x &= (1 << 64) - 1
    x = ((x ^ (x >> 30)) * (_MIX1 & ((1 << 64) - 1))) & ((1 << 64) - 1)
    x = ((x ^ (x >> 27)) * (_MIX2 & ((1 << 64) - 1))) & ((1 << 64) - 1)
    return x ^ (x >> 31)


def key(*parts: int) -> int:
    """An int64 key from whole numbers, such as key(seed, step, prompt, sample). Order matters."""
    h = 0
    for part in parts:
        h = _mix_int(h + _GAMMA + _mix_int(part + 1))
    return _signed(h)


def keys(*parts: int, device: torch.device | str = "cpu") -> Tensor:
    """key(...) as an int64 tensor [1]."""
    return torch.tensor([key(*parts)], dtype=torch.int64, device=device)


def uniform(keys_B: Tensor, stream: tuple[int, ...], counter: int | Tensor) -> Tensor:
    """Uniform numbers in the open interval (0, 1), float64.

    keys_B: [B] int64. stream: the purpose of the numbers, such as (segment, step, purpose). counter: a count n, for the
    counters 0…n-1 -> [B, n]; or int64 counters that broadcast against [B, 1], such as token positions [B, n].
    """
    if isinstance(counter, int):
        counter = torch.arange(counter, device=keys_B.device)
    if counter.ndim == 1:
        counter = counter[None]
    # Not keys_B ^ key(…), which is symmetric: a row's key and a stream may contain the same numbers.
    base = _mix(_mix(keys_B) + key(*stream))
    bits = _mix(base[:, None] + (counter + 1) * _GAMMA)
    # 52 bits plus a half, so that the largest number is below 1 in float64.
    return (((bits >> 12) & ((1 << 52) - 1)).double() + 0.5) * 2.0**-52


def gumbel(keys_B: Tensor, stream: tuple[int, ...], counter: int | Tensor) -> Tensor:
    """Standard Gumbel numbers, float32, shaped as `uniform`."""
    return -(-uniform(keys_B, stream, counter).log()).log().float()
