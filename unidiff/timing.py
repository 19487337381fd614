"""Measures the time of a piece of code, and a machine's speed of matrix products."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch

CPU = torch.device("cpu")


def seconds_of(run: Callable[[], object], repeats: int, device: torch.device = CPU) -> float:
    """Wall-clock seconds of the fastest repeat, after one warm-up. device: synchronised before and after each."""
    return interleaved_seconds({"": run}, repeats, device)[""]


def interleaved_seconds(
    arms: Mapping[str, Callable[[], object]], repeats: int, device: torch.device = CPU
) -> dict[str, float]:
    """Wall-clock seconds of each arm's fastest repeat; arms take turns, after one warm-up turn."""
    best = dict.fromkeys(arms, math.inf)
    for turn in range(repeats + 1):
        for name, run in arms.items():
            took = _once(run, device)
            if turn:
                best[name] = min(best[name], took)
    return best


def matrix_rate(n: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of an n × n matrix product of random numbers."""
    a = torch.randn(n, n, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
    return 2 * n**3 / seconds_of(lambda: a @ a, 5, device)


def _once(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
