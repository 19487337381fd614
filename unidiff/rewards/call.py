"""One call of a reward function: arguments by its signature, and checks of its return value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import torch

from unidiff.rewards.guard import in_words, raised
from unidiff.rewards.reward import Cause, Missing, Reward, parameters
from unidiff.rewards.segment_view import SegmentView, SequenceView

FLOAT32_MAX = torch.finfo(torch.float32).max
Views = Sequence[SegmentView | SequenceView]


@dataclass
class Log:
    """What one reward logs in a batch. The function gets `trainer_state`, `log_metric` and `log_extra` by name, as
    TRL's functions do.

    trainer_state: the run's progress, a `transformers.TrainerState`. count: the number of segments it was given.
    metrics: numbers by name. columns: lists by name, one value per segment.
    """

    trainer_state: Any = None
    count: int = 0
    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """Logs a number for metrics.jsonl. If a name is logged several times, on any process, the mean is written."""
        self.metrics.setdefault(in_words(name, 200, str), []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Adds a column to the reward table, one value per segment. Values other than numbers and texts are stored as
        text. Raises ValueError for a wrong number of values."""
        if len(values) != self.count:
            raise ValueError(f"log_extra({column!r}): got {len(values)} values for {self.count} segments")
        self.columns[in_words(column, 200, str)] = [_plain(value) for value in values]

    @property
    def arguments(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("trainer_state", "log_extra", "log_metric")}


def _plain(value: Any) -> Any:
    """Converts a value to a JSON type, or to text."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    return value if value is None or type(value) in (bool, int, float, str) else in_words(value, 2000, str)


def accepted(
    function: Callable[..., Any],
    columns: dict[str, Any],
    given: Sequence[str] = (),
    named: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The columns that a function's signature asks for: the named ones, or all if it takes **kwargs.

    given: parameters that the caller fills itself. named: extra values, passed only to parameters with these names,
    not through **kwargs. Raises TypeError, with the name, for a column that is asked for and missing.
    """
    asked = {key: value for key, value in parameters(function).items() if key not in given}
    takes_all = any(value.kind is value.VAR_KEYWORD for value in asked.values())
    by_name = {k: v for k, v in asked.items() if v.kind in (v.POSITIONAL_OR_KEYWORD, v.KEYWORD_ONLY)}
    known = columns | {key: value for key, value in (named or {}).items() if key in by_name}
    absent = [k for k, v in by_name.items() if v.default is v.empty and k not in known]
    if absent:
        raise TypeError(f"it asks for the column {absent[0]!r}; the rows have: {', '.join(columns) or 'none'}")
    return {key: value for key, value in known.items() if key not in given and (takes_all or key in by_name)}


def columns_of(segments: Views) -> dict[str, list]:
    """The views' columns as lists, one value per segment; None where a row lacks a column."""
    keys = dict.fromkeys(key for view in segments for key in view.columns)
    return {key: [view.columns.get(key) for view in segments] for key in keys}


def call(reward: Reward, segments: Views, log: Log) -> Any:
    """Calls a batched reward with the columns that it accepts. An async reward returns its coroutine."""
    first = next(iter(parameters(reward.function)), "segments")
    columns = accepted(reward.function, columns_of(segments), given=(first,), named=log.arguments)
    return reward.function(list(segments), **columns)


def calls(reward: Reward, segments: Views) -> list[Callable[[], Any]]:
    """One call per segment, for a reward that takes one segment at a time; columns are single values."""
    first = next(iter(parameters(reward.function)), "segment")
    columns = accepted(reward.function, columns_of(segments), given=(first,))
    return [
        lambda i=i, one=one: reward.function(one, **{key: values[i] for key, values in columns.items()})
        for i, one in enumerate(segments)
    ]


# ---------------------------------------------------------------------------------------------- results


def checked(returned: Any, count: int) -> list[float | Missing]:
    """Converts a reward's return value to `count` finite floats, or `Missing` with the cause.

    If the sequence has a wrong type or length, all values are lost; a bad item loses only its own value.
    """
    if isinstance(returned, torch.Tensor | np.ndarray):
        if returned.ndim != 1:
            shape = list(returned.shape)
            return [Missing(Cause.WRONG_TYPE, f"returned an array of shape {shape}, not [{count}]")] * count
        returned = returned.tolist()
    if not isinstance(returned, list | tuple):
        return [Missing(Cause.WRONG_TYPE, f"returned {type(returned).__name__}, not a list of floats")] * count
    if len(returned) != count:
        return [Missing(Cause.WRONG_LENGTH, f"returned {len(returned)} values for {count} segments")] * count
    return [checked_value(value) for value in returned]


def checked_value(value: Any) -> float | Missing:
    """Converts one value of a reward to a finite float, or `Missing` with the cause."""
    if value is None:
        return Missing(Cause.NONE, "returned None: not applicable")
    try:
        if isinstance(value, Missing):
            return Missing(Cause(value.cause), in_words(value.message, 1000, str))
        if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
            value = value.item()
        if not isinstance(value, Real | np.bool_):
            kind = type(value).__name__
            return Missing(Cause.WRONG_TYPE, f"returned a {kind} ({in_words(value, 40, str)!r}), not a float")
        number = float(value)
    except OverflowError:
        number = math.inf
    except BaseException as error:  # raised by an object of the reward
        return raised(error)
    if not abs(number) <= FLOAT32_MAX:
        return Missing(Cause.NOT_FINITE, f"returned {number}, which is not finite in float32")
    return number
