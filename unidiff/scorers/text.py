"""Text rewards: format, exact and numeric answers, length, repetition.

Each function makes a `Reward`; further options (`weight`, `name`, `required`, `timeout`, …) are those of `reward`.
`which` selects the texts to score: "last" (a response's last segment, the answer), "all", or "steps" (all but the
last). Other texts get None.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

from unidiff.config import typed
from unidiff.rewards.guard import Value, column_of, each
from unidiff.rewards.names import register
from unidiff.rewards.reward import Reward, reward
from unidiff.rewards.segment_view import SegmentView
from unidiff.scorers.answers import Number, last_number

WHICH = ("last", "all", "steps")
UNITS = ("tokens", "words", "characters")


def looked_at(view: SegmentView, which: str) -> bool:
    """Whether a reward with this `which` scores a segment."""
    return which == "all" or view.last == (which == "last")


def check_which(which: str) -> None:
    if which not in WHICH:
        raise ValueError(f"which={which!r}; choose one of {', '.join(WHICH)}")


def check_tolerance(tolerance: float, most: float = math.inf) -> None:
    if not 0 <= tolerance <= most:
        raise ValueError(f"tolerance={tolerance!r}; it must be from 0 to {most:g}")


def text_reward(
    judge: Callable[[SegmentView], Value], name: str, which: str, options: dict[str, Any], column: str | None = None
) -> Reward:
    """A reward from a judge of one text. column: the column that the judge reads, if any."""
    check_which(which)

    def judge_texts(segments: Sequence[SegmentView]) -> list[Value]:
        return each(segments, lambda view: judge(view) if looked_at(view, which) else None, column)

    return reward(judge_texts, on="text", **{"name": name, **options})


@typed
def format_pattern(pattern: str, *, which: str = "last", **options: Any) -> Reward:
    """1 for a text that reached its end token and fully matches the regular expression (dots match line breaks).

    Raises re.error for an invalid pattern.
    """
    compiled = re.compile(pattern, re.DOTALL)

    def judge(view: SegmentView) -> float:
        return float(view.ended and compiled.fullmatch(view.text or "") is not None)

    return text_reward(judge, "format_pattern", which, options)


def extract(text: str, pattern: str | None) -> str | None:
    """The last match of a pattern in a text (its first matching group, if there are groups), or None. If the pattern is
    None, the whole text."""
    if pattern is None:
        return text
    found = list(re.finditer(pattern, text, re.DOTALL))
    return next((group for group in found[-1].groups() if group is not None), found[-1][0]) if found else None


@typed
def exact_answer(column: str = "answer", *, pattern: str | None = None, which: str = "last", **options: Any) -> Reward:
    """1 for an answer whose text equals the column's value, up to case, white space and Unicode normalisation.

    column: the right answer, a text or a number, or a list of right answers; None = not applicable. For other types or
    an empty list the value is missing.
    pattern: finds the answer (see `extract`), such as r"<answer>(.*?)</answer>"; a text without a match gets 0.
    Raises re.error for an invalid pattern.
    """
    re.compile(pattern or "")

    def judge(view: SegmentView) -> Value:
        right = column_of(view, column)
        if right is None:
            return None
        rights = {_plain(right_text(one)) for one in (right if isinstance(right, list | tuple | set) else [right])}
        if not rights:
            raise ValueError("there is no right answer in the list")
        answer = extract(view.text or "", pattern)
        return float(answer is not None and _plain(answer) in rights)

    return text_reward(judge, "exact_answer", which, options, column)


def right_text(right: Any) -> str:
    """A right answer as text. Raises TypeError if it is neither text nor number, ValueError for NaN and inf."""
    if isinstance(right, str):
        return right
    if isinstance(right, bool) or not isinstance(right, Real | Decimal):
        raise TypeError(f"a right answer is a text or a number, not a {type(right).__name__}")
    if not math.isfinite(right):
        raise ValueError(f"a right answer is finite, not {right}")
    return str(right)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split()).casefold()


@typed
def numeric_answer(
    column: str = "answer",
    *,
    pattern: str | None = None,
    tolerance: float = 1e-6,
    which: str = "last",
    **options: Any,
) -> Reward:
    """1 for an answer whose last number equals the column's, up to a tolerance that is relative, and absolute near 0.

    column: a number, or a text whose last number counts (see `last_number`: "1,234", "3/4", "50 %", "-$5"); for other
    types the value is missing. pattern: as in `exact_answer`.
    """
    check_tolerance(tolerance)
    re.compile(pattern or "")

    def judge(view: SegmentView) -> Value:
        right = column_of(view, column)
        if right is None:
            return None
        text = right_text(right)
        wanted = last_number(right) if isinstance(right, str) else Number(float(right))
        if wanted is None or not math.isfinite(wanted.value):
            raise ValueError(f"the right answer {text[:80]!r} has no number")
        given = last_number(extract(view.text or "", pattern) or "")
        return float(given is not None and given.equals(wanted, tolerance))

    return text_reward(judge, "numeric_answer", which, options, column)


@typed
def length(most: int, *, least: int = 0, unit: str = "tokens", which: str = "all", **options: Any) -> Reward:
    """1 for a text of `least` to `most` units. A shorter text gets size / `least`; for a longer text the value falls
    linearly to 0 at twice `most`. unit: "tokens", "words" or "characters"."""
    if not 0 <= least <= most or most == 0:
        raise ValueError(f"least={least!r}, most={most!r}; it must be 0 <= least <= most, and most above 0")
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r}; choose one of {', '.join(UNITS)}")

    def judge(view: SegmentView) -> float:
        text = view.text or ""
        size = len(view.tokens) if unit == "tokens" else len(text.split() if unit == "words" else text)
        return size / least if size < least else max(0.0, 1 - max(size - most, 0) / most)

    return text_reward(judge, "length", which, options)


@typed
def repetition(n: int = 3, *, which: str = "all", **options: Any) -> Reward:
    """Minus the share of repeated word n-grams: 0 without repetition, near −1 for a loop."""
    if n < 1:
        raise ValueError(f"n={n!r}; it must be 1 or more")

    def judge(view: SegmentView) -> float:
        words = (view.text or "").casefold().split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0

    return text_reward(judge, "repetition", which, options)


for _name, _reward in {
    "exact_answer": exact_answer(),
    "numeric_answer": numeric_answer(),
    "repetition": repetition(),
}.items():
    register(_name)(_reward)
