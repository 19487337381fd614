"""Isolates rewards: a bad row loses only its own value, and changes to the process's state are undone."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import random
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from unidiff.rewards.reward import Cause, Missing
from unidiff.rewards.segment_view import SegmentView, SequenceView

logger = logging.getLogger(__name__)

Value = float | Missing | None
T = TypeVar("T")

# ---------------------------------------------------------------------------------------------- words


def in_words(value: Any, most: int = 80, form: Callable[[Any], str] = repr) -> str:
    """A value as printable text of at most `most` characters, even if its `__repr__` or `__str__` raises."""
    try:
        text = form(value).encode("utf-8", "backslashreplace").decode()
    except BaseException as error:
        return f"<a {type(value).__name__} whose {form.__name__}() raises {type(error).__name__}>"
    return text if len(text) <= most else text[:most] + "…"


def raised(error: BaseException) -> Missing:
    """Converts a reward's exception to a `Missing`. The user's own Ctrl-C is raised again and ends the run.

    A KeyboardInterrupt comes from the user if it is in the main thread and Python's own handler has SIGINT. Otherwise
    (also while a trainer collects signals) the reward itself raised it.
    """
    main = threading.current_thread() is threading.main_thread()
    if isinstance(error, KeyboardInterrupt) and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        raise error
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return Missing(Cause.RAISED, f"raised {type(error).__name__}: {in_words(error, 500, str)}{place}")


# ---------------------------------------------------------------------------------------------- rows


def each(
    views: Sequence[SegmentView | SequenceView], judge: Callable[[Any], T], column: str | None = None
) -> list[T | Missing]:
    """Calls `judge` on each view. If it raises, the result is a `Missing` with the cause, and with the row's value of
    `column`, if the judge reads one."""

    def one(view: Any) -> T | Missing:
        try:
            return judge(view)
        except Exception as error:
            lost = raised(error)
            held = "" if column is None else f"; the column {column!r} holds {in_words(view.columns.get(column))}"
            return Missing(lost.cause, lost.message + held)

    return [one(view) for view in views]


def fill(ready: Sequence[T | Missing | None], score: Callable[[list[T]], Sequence[Value]]) -> list[Value]:
    """Calls `score` once on all items that are not `Missing` or None (if any), and merges the results back."""
    good: list[Any] = [one for one in ready if not isinstance(one, Missing | None)]
    values = iter(score(good) if good else ())
    return [one if isinstance(one, Missing | None) else next(values) for one in ready]


def column_of(view: SegmentView | SequenceView, column: str) -> Any:
    """A row's value of a column. Numpy and torch scalars become Python numbers, 1-d arrays become lists.

    Raises ValueError, with the known columns, if the row lacks it.
    """
    if column not in view.columns:
        known = ", ".join(map(str, view.columns)) or "none"
        raise ValueError(f"the row has no column {column!r}; it has: {known}")
    value = view.columns[column]
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim < 2:
        return value.tolist()
    return value


# ---------------------------------------------------------------------------------------------- process


def _autocast() -> list[tuple[str, bool, torch.dtype]]:
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]


def _set_autocast(modes: list[tuple[str, bool, torch.dtype]]) -> None:
    for kind, enabled, dtype in modes:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


def _errors() -> list[Any]:
    return [one for one in warnings.filters if one[0] == "error"]


def _set_errors(kept: list[Any]) -> None:
    warnings.filters[:] = [one for one in warnings.filters if one[0] != "error" or one in kept]  # type: ignore[index]


class _Environment(dict[str, str]):
    """The process's environment variables. New variables do not count as a change, because libraries set some."""

    def __ne__(self, before: object) -> bool:
        return not (isinstance(before, dict) and before.items() <= self.items())

    @staticmethod
    def read() -> _Environment:
        return _Environment(os.environ)


class _Places(list[str]):
    """`sys.path`. New entries do not count as a change."""

    def __ne__(self, before: object) -> bool:
        return not isinstance(before, list) or [place for place in self if place in before] != list(before)

    @staticmethod
    def read() -> _Places:
        return _Places(sys.path)

    @staticmethod
    def set_back(before: list[str]) -> None:
        sys.path[:] = [*before, *(place for place in sys.path if place not in before)]


# Process-wide state that a reward may change, with functions to read and to set it.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the working directory": (os.getcwd, os.chdir),
    "the environment": (_Environment.read, lambda before: os.environ.update(before)),
    "sys.path": (_Places.read, _Places.set_back),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, torch.set_default_device),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's determinism": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    "torch's precision of matmuls": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch's autocast": (_autocast, _set_autocast),
    "torch's anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "cuDNN's benchmark mode": (
        lambda: torch.backends.cudnn.benchmark,
        lambda on: setattr(torch.backends.cudnn, "benchmark", on),
    ),
    "which warnings are errors": (_errors, _set_errors),
    "the garbage collector": (gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    "sys.excepthook": (lambda: sys.excepthook, lambda hook: setattr(sys, "excepthook", hook)),
    "numpy's handling of errors": (np.geterr, lambda modes: np.seterr(**modes)),
    "sys.stdout and sys.stderr": (
        lambda: (sys.stdout, sys.stderr),
        lambda both: (setattr(sys, "stdout", both[0]), setattr(sys, "stderr", both[1])),
    ),
}


class Surroundings:
    """The state of the process before rewards ran, to be restored after each of them.

    It covers the working directory, environment, module paths, torch's and numpy's settings, signal handlers and
    timers, and the global random generators. A change that a reward makes in parallel to other work stays in force
    until the reward is waited for.
    """

    def __init__(self) -> None:
        self._settings = {name: _state(read) for name, (read, _) in _SETTINGS.items()}
        self._handlers = {n: signal.getsignal(n) for n in signal.valid_signals()}
        self._timer = signal.getitimer(signal.ITIMER_REAL)
        self._random = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore(self, name: str) -> None:
        """Restores everything, and warns of changes. name: of the reward that has just ended."""
        changed = []
        for what, (read, set_back) in _SETTINGS.items():
            before = self._settings[what]
            if before is not None and _state(read) != before:
                with contextlib.suppress(OSError):  # the directory was deleted
                    set_back(before)
                changed.append(what)
        if threading.current_thread() is threading.main_thread():
            changed += self._restore_signals()
        random.setstate(self._random[0])
        np.random.set_state(self._random[1])  # noqa: NPY002
        torch.set_rng_state(self._random[2])
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        if changed:
            _warn("reward %r, or one beside it, changed %s: set back", name, " and ".join(changed))

    def _restore_signals(self) -> list[str]:
        changed = []
        for number, handler in self._handlers.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)
                changed.append(f"the handler of {signal.Signals(number).name}")
        if self._timer == (0.0, 0.0) != signal.getitimer(signal.ITIMER_REAL):
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            changed.append("the timer of SIGALRM")
        return changed


_warn = functools.cache(logger.warning)  # once per process, as the reward will repeat it


def _state(read: Callable[[], Any]) -> Any:
    """The state, or None if the working directory was deleted."""
    try:
        return read()
    except OSError:
        return None
