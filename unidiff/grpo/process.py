"""A run as a process of the machine: how it is asked to stop, and where its time goes."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from accelerate import Accelerator


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; a second one acts as usual."""
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        if number in asked:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
        asked.append(number)

    try:
        previous: dict[int, Any] = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are somebody else's business
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def check_tracker(tracker: str | None, accelerator: Accelerator) -> None:
    """Raises ImportError if the package of a tracker is missing, of which accelerate only warns."""
    if tracker and not accelerator.log_with:
        package = "unidiff[tracking]" if tracker in ("tensorboard", "wandb", "all") else tracker.replace("_", "-")
        raise ImportError(f'tracker {tracker} is not installed: pip install "{package}"')


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Ends a phase, which began where the one before it ended. One that comes again adds up."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """What trackers accept as hyper-parameters."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}
