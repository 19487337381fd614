"""Rewards as marked functions: the decorator, the registry, the TRL adapter and the checks of results.

A reward is `f(segments, **columns) -> list[float | None]`, sync or async. `segments` holds the `SegmentView`s
of one modality from all rows of the batch (or one `SequenceView` a row); each column is a list with one value
a segment. None means "not applicable". A fault costs a reward its own values and nothing else: a lost value
is left out of every mean, it is never a 0.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image

from unidiff.rewards.segment_view import SegmentView, SequenceView

TARGETS = ("text", "image", "sequence")
CREDITS = ("text", "image", "last")
FLOAT32_MAX = torch.finfo(torch.float32).max


class Cause(StrEnum):
    """Why a value is missing."""

    RAISED = "raised"
    TIMEOUT = "timeout"
    WRONG_LENGTH = "wrong_length"
    WRONG_TYPE = "wrong_type"
    NOT_FINITE = "not_finite"
    NONE = "none"


class RewardError(RuntimeError):
    """A reward with `required=True` has no value for a sample."""


@dataclass(frozen=True)
class Loss:
    """A value that is missing: why, and in words."""

    cause: Cause
    message: str


@dataclass(eq=False)
class Reward:
    """A reward function and how it counts.

    on:       what it scores: every text segment, every image segment, or each response as a whole.
    weight:   finite factor of its values.
    credit:   sequence rewards: the modalities whose tokens it credits, ("text",) unless told. ("last",)
              credits text too, but only its last segment when the router works segment by segment.
    required: a missing value ends the run with a RewardError.
    timeout:  seconds for one batch; None waits for ever.
    """

    function: Callable[..., Any]
    name: str
    on: str = "text"
    weight: float = 1.0
    credit: tuple[str, ...] = ()
    required: bool = False
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"reward {self.name!r}: expected a function, got {type(self.function).__name__}")
        if self.on not in TARGETS:
            raise ValueError(f"reward {self.name!r}: on={self.on!r}; choose one of {', '.join(TARGETS)}")
        if not math.isfinite(self.weight):
            raise ValueError(f"reward {self.name!r}: weight={self.weight!r} is not a finite number")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"reward {self.name!r}: timeout={self.timeout!r}; give seconds above 0, or None")
        self.credit = _credit(self.name, self.on, self.credit)
        functools.update_wrapper(self, self.function, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Reward({self.name!r}, on={self.on!r}, weight={self.weight:g})"

    @functools.cached_property
    def asynchronous(self) -> bool:
        """Calling the function gives a coroutine."""
        call = getattr(self.function, "asynchronous", None)
        if call is not None:
            return bool(call)
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(
            getattr(self.function, "__call__", None)  # noqa: B004 (an instance's bound method, not a test)
        )


def _credit(name: str, on: str, credit: str | Iterable[str] | None) -> tuple[str, ...]:
    """The modalities that a reward credits, in one form."""
    if on != "sequence":
        if credit and tuple(credit) != (on,):
            raise ValueError(f"reward {name!r}: credit is for on='sequence'; a reward on {on!r} credits {on!r}")
        return (on,)
    if credit == "both":
        return ("text", "image")
    credits = (credit,) if isinstance(credit, str) else tuple(credit or ("text",))
    unknown = [part for part in credits if part not in CREDITS]
    if unknown or len(set(credits)) != len(credits) or {"text", "last"} <= set(credits):
        raise ValueError(f"reward {name!r}: credit={credit!r}; choose 'text', 'image', 'both' or 'last'")
    return credits


def reward(
    function: Callable[..., Any] | None = None,
    *,
    on: str = "text",
    weight: float = 1.0,
    credit: str | Iterable[str] | None = None,
    required: bool = False,
    timeout: float | None = None,
    name: str | None = None,
) -> Any:
    """Marks a function or callable object, sync or async, as a reward. See `Reward` for the options.

        @reward(on="image", weight=2.0)
        def is_square(segments, **columns):
            return [float(s.image.width == s.image.height) for s in segments]

    Works bare (`@reward`: on text), with options, and as a call: `reward(scorer, on="image")`. The name is
    the function's, or the class's for a callable object.
    """

    def mark(target: Callable[..., Any]) -> Reward:
        title = name or getattr(target, "__name__", type(target).__name__)
        credits = _credit(title, on, credit)
        return Reward(target, title, on, float(weight), credits, required, timeout)

    return mark if function is None else mark(function)


# ---------------------------------------------------------------------------------------------- registry

REWARDS: dict[str, Reward] = {}


def register(name: str) -> Callable[[Reward], Reward]:
    """Decorator that makes a reward known to configs by name. ValueError if the name is taken."""

    def add(marked: Reward) -> Reward:
        if name in REWARDS:
            raise ValueError(f"a reward named {name!r} is registered already")
        REWARDS[name] = replace(as_reward(marked), name=name)
        return marked

    return add


def resolve(name: str) -> Reward:
    """The reward that a config names: a registered name, or `package.module:function`.

    Errors: ValueError for an unknown name (with the nearest known one) or a module without that function.
    """
    if name in REWARDS:
        return REWARDS[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"registered: {', '.join(sorted(REWARDS)) or 'none'}."
        raise ValueError(f"unknown reward {name!r}; {hint} A function is named as package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"reward {name!r}: {error}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"reward {name!r}: module {module_name!r} has no {attribute!r}")
    return as_reward(getattr(module, attribute))


def as_reward(given: Any) -> Reward:
    """A Reward from a Reward, a name, or an unmarked function with a `completions` parameter (TRL style)."""
    if isinstance(given, Reward):
        return given
    if isinstance(given, str):
        return resolve(given)
    if callable(given) and "completions" in _parameters(given):
        return from_trl(given)
    raise TypeError(f"{given!r} is no reward: mark the function with @reward(on='text'|'image'|'sequence')")


def as_rewards(given: Iterable[Any]) -> list[Reward]:
    """All of them as Rewards. ValueError if two share a name, since metrics and faults go by name."""
    rewards = [as_reward(one) for one in given]
    names = [one.name for one in rewards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two rewards are named {twice[0]!r}; give one another name: reward(..., name='…')")
    return rewards


# ---------------------------------------------------------------------------------------------- arguments


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters of a callable by name; empty where Python cannot tell (some builtins)."""
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def accepted(function: Callable[..., Any], columns: dict[str, list], given: Sequence[str] = ()) -> dict[str, list]:
    """The columns that a function's signature asks for: the named ones, or all if it takes **kwargs.

    given: parameters that the caller fills itself. TypeError names a column that is asked for and not there.
    """
    parameters = {key: value for key, value in _parameters(function).items() if key not in given}
    takes_all = any(value.kind is value.VAR_KEYWORD for value in parameters.values())
    by_name = {k: v for k, v in parameters.items() if v.kind in (v.POSITIONAL_OR_KEYWORD, v.KEYWORD_ONLY)}
    absent = [k for k, v in by_name.items() if v.default is v.empty and k not in columns]
    if absent:
        raise TypeError(f"it asks for the column {absent[0]!r}; the rows have: {', '.join(columns) or 'none'}")
    return {key: column for key, column in columns.items() if key not in given and (takes_all or key in by_name)}


def columns_of(segments: Sequence[SegmentView | SequenceView]) -> dict[str, list]:
    """The views' columns as lists with one value a segment; None where a row lacks a column."""
    keys = dict.fromkeys(key for view in segments for key in view.columns)
    return {key: [view.columns.get(key) for view in segments] for key in keys}


def call(reward: Reward, segments: Sequence[SegmentView | SequenceView]) -> Any:
    """Calls a reward on segments with the columns that it accepts. An async one gives its coroutine."""
    first = next(iter(_parameters(reward.function)), "segments")
    return reward.function(list(segments), **accepted(reward.function, columns_of(segments), given=(first,)))


# ---------------------------------------------------------------------------------------------- results


def checked(returned: Any, count: int) -> list[float | Loss]:
    """What a reward returned, as `count` finite floats or the reasons why there is none.

    A sequence of the wrong kind or length loses every value; a bad item loses its own only.
    """
    if isinstance(returned, torch.Tensor | np.ndarray):
        if returned.ndim != 1:
            shape = list(returned.shape)
            return [Loss(Cause.WRONG_TYPE, f"returned an array of shape {shape}, not [{count}]")] * count
        returned = returned.tolist()
    if not isinstance(returned, list | tuple):
        return [Loss(Cause.WRONG_TYPE, f"returned {type(returned).__name__}, not a list of floats")] * count
    if len(returned) != count:
        return [Loss(Cause.WRONG_LENGTH, f"returned {len(returned)} values for {count} segments")] * count
    return [_checked_value(value) for value in returned]


def _checked_value(value: Any) -> float | Loss:
    if value is None:
        return Loss(Cause.NONE, "returned None: not applicable")
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, Real | np.bool_):
        return Loss(Cause.WRONG_TYPE, f"returned a {type(value).__name__} ({str(value)[:40]!r}), not a float")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= FLOAT32_MAX:
        return Loss(Cause.NOT_FINITE, f"returned {number}, which is not finite in float32")
    return number


# ---------------------------------------------------------------------------------------------- TRL


@dataclass(eq=False)
class TRLFunction:
    """A TRL-style function `(prompts, completions, **columns)` behind unidiff's signature.

    Prompts and completions are the texts alone, joined by newlines: TRL functions know no pictures.
    `completion_ids` (lists of ids of all sampled segments) goes to functions that ask for it.
    chat: completions (and prompts) are given as chat messages, [{"role": …, "content": …}].
    """

    function: Callable[..., Any]
    chat: bool = False

    @property
    def asynchronous(self) -> bool:
        """The wrapped function is async, so calling this gives its coroutine."""
        return Reward(self.function, "trl").asynchronous

    def __call__(self, segments: list[SequenceView], **columns: list) -> Any:
        prompts = [[part for part in view.prompt if not isinstance(part, Image.Image)] for view in segments]
        own = {
            "prompts": [self._message("user", "\n".join(map(str, parts))) for parts in prompts],
            "completions": [self._message("assistant", "\n".join(view.texts)) for view in segments],
            "completion_ids": [[i for s in view.segments for i in s.tokens.tolist()] for view in segments],
        }
        return self.function(**accepted(self.function, {**columns, **own}))

    def _message(self, role: str, content: str) -> str | list[dict[str, str]]:
        return [{"role": role, "content": content}] if self.chat else content


def from_trl(
    function: Callable[..., Any],
    *,
    weight: float = 1.0,
    credit: str | Iterable[str] = "text",
    chat: bool = False,
    required: bool = False,
    timeout: float | None = None,
    name: str | None = None,
) -> Reward:
    """A reward on whole responses from a TRL-style `(prompts, completions, **columns)`; see `TRLFunction`."""
    title = name or getattr(function, "__name__", type(function).__name__)
    return reward(
        TRLFunction(function, chat),
        on="sequence",
        weight=weight,
        credit=credit,
        required=required,
        timeout=timeout,
        name=title,
    )
