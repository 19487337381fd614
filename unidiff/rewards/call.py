"""One call of a reward function: the arguments that its signature asks for, and the checks of what it returns."""

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
    """What one reward says in a batch beside its values; it gets these three by name, as TRL's functions do.

    trainer_state: where the run is, a `transformers.TrainerState`. count: how many segments it was given.
    metrics: numbers by name. columns: lists by name, one value a segment.
    """

    trainer_state: Any = None
    count: int = 0
    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """A number for metrics.jsonl; the mean is written if one is logged more than once, over all processes."""
        self.metrics.setdefault(in_words(name, 200, str), []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """One value a segment, kept in the table beside the rewards: a number or a text, of anything else its text.
        ValueError for another number of values."""
        if len(values) != self.count:
            raise ValueError(f"log_extra({column!r}): got {len(values)} values for {self.count} segments")
        self.columns[in_words(column, 200, str)] = [_plain(value) for value in values]

    @property
    def arguments(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("trainer_state", "log_extra", "log_metric")}


def _plain(value: Any) -> Any:
    """What JSON has a word for."""
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

    given: parameters that the caller fills itself. named: values for parameters of these names, which **kwargs does
    not ask for. TypeError names a column that is asked for and not there.
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
    """The views' columns as lists with one value a segment; None where a row lacks a column."""
    keys = dict.fromkeys(key for view in segments for key in view.columns)
    return {key: [view.columns.get(key) for view in segments] for key in keys}


def call(reward: Reward, segments: Views, log: Log) -> Any:
    """Calls a batched reward with the columns that it accepts. An async one gives its coroutine."""
    first = next(iter(parameters(reward.function)), "segments")
    columns = accepted(reward.function, columns_of(segments), given=(first,), named=log.arguments)
    return reward.function(list(segments), **columns)


def calls(reward: Reward, segments: Views) -> list[Callable[[], Any]]:
    """A call for each segment of a reward that takes one at a time; its columns are single values."""
    first = next(iter(parameters(reward.function)), "segment")
    columns = accepted(reward.function, columns_of(segments), given=(first,))
    return [
        lambda i=i, one=one: reward.function(one, **{key: values[i] for key, values in columns.items()})
        for i, one in enumerate(segments)
    ]


# ---------------------------------------------------------------------------------------------- results


def checked(returned: Any, count: int) -> list[float | Missing]:
    """What a reward returned, as `count` finite floats or the reasons why there is none.

    A sequence of the wrong kind or length loses every value; a bad item loses its own only.
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
    """One value of a reward as a finite float, or the reason why there is none."""
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
    except BaseException as error:  # of an object of the reward's own
        return raised(error)
    if not abs(number) <= FLOAT32_MAX:
        return Missing(Cause.NOT_FINITE, f"returned {number}, which is not finite in float32")
    return number
