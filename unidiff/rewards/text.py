"""Text rewards: format, exact and numeric answers, length, repetition.

Each function makes a `Reward`; further options (`weight`, `name`, `required`, `timeout`, …) are those of `reward`.
`which` says what texts a reward looks at: "last", a response's last segment, where its answer stands; "all"; or
"steps", all but the last. The others get None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from unidiff.rewards.reward import Cause, Loss, Reward, register, reward
from unidiff.rewards.segment_view import SegmentView

WHICH = ("last", "all", "steps")
UNITS = ("tokens", "words", "characters")
NUMBER = re.compile(r"[-+−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")

Value = float | Loss | None


def looked_at(view: SegmentView, which: str) -> bool:
    """Whether a reward with this `which` looks at a segment."""
    return which == "all" or view.last == (which == "last")


def check_which(which: str) -> None:
    if which not in WHICH:
        raise ValueError(f"which={which!r}; choose one of {', '.join(WHICH)}")


def text_reward(judge: Callable[[SegmentView], Value], name: str, which: str, options: dict[str, Any]) -> Reward:
    """A reward from what it says of one text."""
    check_which(which)

    def judge_texts(segments: Sequence[SegmentView]) -> list[Value]:
        return [judge(s) if looked_at(s, which) else None for s in segments]

    return reward(judge_texts, on="text", **{"name": name, **options})


def format_pattern(pattern: str, *, which: str = "last", **options: Any) -> Reward:
    """1 for a text that reached its end token and matches the regular expression as a whole (dots match line breaks).

    Errors: re.error for a pattern that is none.
    """
    compiled = re.compile(pattern, re.DOTALL)

    def judge(view: SegmentView) -> float:
        return float(view.ended and compiled.fullmatch(view.text or "") is not None)

    return text_reward(judge, "format_pattern", which, options)


def extract(text: str, pattern: str | None) -> str | None:
    """The last match of a pattern in a text (its first group, if it has one); the whole text without a pattern."""
    if pattern is None:
        return text
    found = list(re.finditer(pattern, text, re.DOTALL))
    return found[-1][1 if found[-1].re.groups else 0] if found else None


def exact_answer(column: str = "answer", *, pattern: str | None = None, which: str = "last", **options: Any) -> Reward:
    """1 for an answer that equals the column's value as text, but for case and white space.

    column: the right answer, or a list of right answers; None = there is none, and the text gets None.
    pattern: where the answer stands (see `extract`), such as r"<answer>(.*?)</answer>"; a text without it gets 0.
    """

    def judge(view: SegmentView) -> Value:
        right = view.columns[column]
        if right is None:
            return None
        answer = extract(view.text or "", pattern)
        rights = right if isinstance(right, list | tuple) else [right]
        return float(answer is not None and _plain(answer) in {_plain(str(one)) for one in rights})

    return text_reward(judge, "exact_answer", which, options)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def last_number(text: str) -> float | None:
    """The last number of a text: "1,234.5", "-3", "2e-3". None without one."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("−", "-")) if found else None


def numeric_answer(
    column: str = "answer",
    *,
    pattern: str | None = None,
    tolerance: float = 1e-6,
    which: str = "last",
    **options: Any,
) -> Reward:
    """1 for an answer whose last number is the column's, up to a relative (and near 0 absolute) tolerance.

    column: a number, or a text whose last number counts. pattern: as in `exact_answer`.
    """

    def judge(view: SegmentView) -> Value:
        right = view.columns[column]
        if right is None:
            return None
        wanted = last_number(right) if isinstance(right, str) else float(right)
        if wanted is None:
            return Loss(Cause.RAISED, f"the column {column!r} holds {right!r}, which has no number")
        given = last_number(extract(view.text or "", pattern) or "")
        return float(given is not None and math.isclose(given, wanted, rel_tol=tolerance, abs_tol=tolerance))

    return text_reward(judge, "numeric_answer", which, options)


def length(most: int, *, least: int = 0, unit: str = "tokens", which: str = "all", **options: Any) -> Reward:
    """1 for a text of `least` to `most` units. Shorter ones get their share of `least`; longer ones fall to 0 at twice
    `most`. unit: "tokens", "words" or "characters"."""
    if not 0 <= least <= most or most == 0:
        raise ValueError(f"least={least!r}, most={most!r}; it must be 0 <= least <= most, and most above 0")
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r}; choose one of {', '.join(UNITS)}")

    def judge(view: SegmentView) -> float:
        text = view.text or ""
        size = len(view.tokens) if unit == "tokens" else len(text.split() if unit == "words" else text)
        return size / least if size < least else max(0.0, 1 - max(size - most, 0) / most)

    return text_reward(judge, "length", which, options)


def repetition(n: int = 3, *, which: str = "all", **options: Any) -> Reward:
    """Minus the share of n-grams of words that stood in the text before: 0 for none, near −1 for a loop."""
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
