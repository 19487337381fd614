"""Rewards as marked functions: the decorator, the registry, and the names of rewards in configs.

A reward is `f(segments, **columns) -> list[float | None]`, sync or async. `segments` holds the `SegmentView`s
of one modality from all rows of the batch (or one `SequenceView` per row); each column is a list with one value
per segment. With `batched=False` it is `f(segment, **columns) -> float | None`, called for each segment. None means
"not applicable". A fault costs a reward only its own values. A lost value is left out of every mean; it does not
count as 0.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from torch import nn

from unidiff.config import check_fields

TARGETS = ("text", "image", "sequence")
CREDITS = ("text", "image", "last")
REWARD_SCALES = ("group", "batch", "none", "rank")


class Cause(StrEnum):
    """Why a value is missing."""

    RAISED = "raised"
    TIMEOUT = "timeout"
    WRONG_LENGTH = "wrong_length"
    WRONG_TYPE = "wrong_type"
    NOT_FINITE = "not_finite"
    SKIPPED = "skipped"
    NONE = "none"


class RewardError(RuntimeError):
    """A reward with `required=True` has no value for a sample."""


@dataclass(frozen=True)
class Missing:
    """A missing value, with its cause and a message."""

    cause: Cause
    message: str


@dataclass
class Breaker:
    """Circuit breaker: skips a reward that fails repeatedly, so that it does not cost its timeout in every batch.

    failed: consecutive batches in which every value was lost to a fault. resting: batches still to skip.
    """

    REST: ClassVar[int] = 10  # batches to skip before the reward is tried again

    failed: int = 0
    resting: int = 0

    def skips(self) -> bool:
        """Whether to skip this batch. Counts a skipped batch down."""
        if self.resting:
            self.resting -= 1
            return True
        return False

    def record(self, faulty: bool, limit: int | None) -> bool:
        """Records a batch; returns whether the reward rests now. After a rest, one more failure starts the next."""
        self.failed = self.failed + 1 if faulty else 0
        if limit is None or self.failed < limit:
            return False
        self.resting = self.REST
        return True


@dataclass(eq=False)
class Reward:
    """A reward function with its options.

    on:       what it scores: "text" or "image" (each segment), or "sequence" (each whole response).
    weight:   finite factor of its values.
    credit:   sequence rewards: the modalities whose tokens it credits, default ("text",). ("last",) credits text too,
              but with assignment "segment" only the last text segment.
    scale:    how its values are rescaled before they are weighted and summed (`normalize.rescale`): None = unchanged,
              "group", "batch", "none", "rank".
    required: a missing value ends the run with a RewardError.
    timeout:  seconds for one batch, including all attempts; None waits for ever.
    retries:  further attempts after an exception, with pauses that double from half a second.
    breaker:  consecutive batches without any value after which the reward is skipped for a while; None = never.
    batched:  True: called once with all segments of a batch; False: once per segment.
    kind:     scores only rows of this kind (`unidiff.tasks.Example.kind`) and of its sub-kinds ("kind/…"); "" = all.
    """

    function: Callable[..., Any]
    name: str
    on: str = "text"
    weight: float = 1.0
    credit: tuple[str, ...] = ()
    required: bool = False
    timeout: float | None = None
    batched: bool = True
    scale: str | None = None
    retries: int = 0
    breaker: int | None = 5
    kind: str = ""
    state: Breaker = field(default_factory=Breaker, init=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"reward {self.name!r}: expected a function, got {type(self.function).__name__}")
        if not (isinstance(self.name, str) and self.name.strip() and self.name.isprintable()):
            raise ValueError(f"a reward cannot be named {self.name!r}: a name is printable text, on one line")
        if self.on not in TARGETS:
            raise ValueError(f"reward {self.name!r}: on={self.on!r}; choose one of {', '.join(TARGETS)}")
        self.credit = _credit(self.name, self.on, self.credit)
        check_fields(self, f"reward {self.name!r}: ")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"reward {self.name!r}: timeout={self.timeout!r}; give seconds above 0, or None")
        if self.scale is not None and self.scale not in REWARD_SCALES:
            known = ", ".join(REWARD_SCALES)
            raise ValueError(f"reward {self.name!r}: scale={self.scale!r}; choose one of {known}, or None")
        if self.retries < 0:
            raise ValueError(f"reward {self.name!r}: retries={self.retries!r}; give 0 or more")
        if self.breaker is not None and self.breaker < 1:
            raise ValueError(f"reward {self.name!r}: breaker={self.breaker!r}; give batches from 1 up, or None")
        if isinstance(self.function, nn.Module):
            self.function.eval()
        functools.update_wrapper(self, self.function, updated=())

    def looks_at(self, kind: str) -> bool:
        """Whether it scores rows of a kind."""
        return not self.kind or kind == self.kind or kind.startswith(self.kind + "/")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Reward({self.name!r}, on={self.on!r}, weight={self.weight:g})"

    @functools.cached_property
    def asynchronous(self) -> bool:
        """Whether calling the function returns a coroutine."""
        call = getattr(self.function, "asynchronous", None)
        if call is not None:
            return bool(call)
        function = self.function.func if isinstance(self.function, functools.partial) else self.function
        return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 (an instance's bound method, not a test)
        )


def _credit(name: str, on: str, credit: str | Iterable[str] | None) -> tuple[str, ...]:
    """The modalities that a reward credits, validated, as a tuple."""
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
    scale: str | None = None,
    required: bool = False,
    timeout: float | None = None,
    retries: int = 0,
    breaker: int | None = 5,
    batched: bool = True,
    name: str | None = None,
) -> Any:
    """Marks a function, callable object or `nn.Module` (set to eval mode), sync or async, as a reward. See `Reward`
    for the options.

        @reward(on="image", weight=2.0)
        def is_square(segments, **columns):
            return [float(s.image.width == s.image.height) for s in segments]

    Works bare (`@reward`: on text), with options, and as a call: `reward(scorer, on="image")`. The default name is the
    function's, or the class's for a callable object.
    """

    def mark(target: Callable[..., Any]) -> Reward:
        title = name_of(target) if name is None else name
        return Reward(
            target,
            title,
            on,
            weight,
            _credit(title, on, credit),
            required,
            timeout,
            batched=batched,
            scale=scale,
            retries=retries,
            breaker=breaker,
        )

    return mark if function is None else mark(function)


def name_of(function: Callable[..., Any]) -> str:
    """A function's name, also inside functools.partial; for a callable object, its class's name."""
    inner = function.func if isinstance(function, functools.partial) else function
    return getattr(inner, "__name__", type(inner).__name__)


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters of a callable by name; empty if Python cannot tell (some builtins)."""
    try:
        return dict(inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters)
    except (TypeError, ValueError):
        return {}
