"""How long a piece of code takes, and how fast a machine multiplies matrices."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

CPU = torch.device("cpu")


def seconds_of(run: Callable[[], object], repeats: int, device: torch.device = CPU) -> float:
    """Wall-clock seconds of the fastest repeat, after one that warms up. device: waited for before and after each."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def matrix_rate(n: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of an n × n matrix product of random numbers."""
    a = torch.randn(n, n, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
    return 2 * n**3 / seconds_of(lambda: a @ a, 5, device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
