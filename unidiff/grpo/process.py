"""Processes of a run: exchange of values, stop signals, threads and timing."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM. The second signal of a kind acts as usual."""
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        if number in asked:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
        asked.append(number)

    try:
        previous: dict[int, Any] = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # handlers can be set only in the main thread
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def check_tracker(tracker: str | None, accelerator: Accelerator) -> None:
    """Raises ImportError if a tracker's package is missing (accelerate only warns), and ValueError if an accelerator
    that was made elsewhere lacks the tracker."""
    if not tracker or accelerator.log_with:
        return
    if tracker in map(str, get_available_trackers()):
        raise ValueError(f"tracker is {tracker!r}, but the accelerator was made without it: Accelerator(log_with=…)")
    package = "unidiff[tracking]" if tracker in ("tensorboard", "wandb", "all") else tracker.replace("_", "-")
    raise ImportError(f'tracker {tracker} is not installed: pip install "{package}"')


def everybody(value: Any, accelerator: Accelerator | None) -> list[Any]:
    """Gathers the value of each process, in order."""
    many = accelerator is not None and accelerator.num_processes > 1
    return gather_object([value]) if many else [value]


def largest(accelerator: Accelerator, *values: float) -> float:
    """The largest of these numbers over all processes; NaN if one is NaN."""
    return float(torch.tensor(everybody(values, accelerator), dtype=torch.float64).max())


def share_cores(accelerator: Accelerator, threads: int | None = None) -> None:
    """Sets the threads of a process on a CPU; None = OMP_NUM_THREADS, or its share of the cores. With several
    processes the variable is ignored, because torchrun sets it to 1."""
    if accelerator.device.type == "cpu":
        asked = os.environ.get("OMP_NUM_THREADS", "") if accelerator.num_processes == 1 else ""
        own = int(asked) if asked.isdigit() else 0
        torch.set_num_threads(threads or own or max((os.cpu_count() or 1) // accelerator.num_processes, 1))


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Ends a phase; it began when the last one ended. Repeated phases add up."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """Converts settings to types that trackers accept."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}
