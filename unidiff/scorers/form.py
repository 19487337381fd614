r"""Rewards for the format of a text: tags, boxes, whole numbers. The values are those of d1 (2504.12216) and MaskGRPO
(2510.02880). Some of theirs can never be earned; ours can, and the docstrings state the difference.

Options are those of unidiff.scorers.text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from unidiff.config import typed
from unidiff.rewards.names import register
from unidiff.rewards.reward import Reward
from unidiff.rewards.segment_view import SegmentView
from unidiff.scorers.answers import last_boxes
from unidiff.scorers.text import extract, text_reward

REASONING = r"<reasoning>.*?</reasoning>"
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
_WHOLE = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)")


@typed
def soft_format(pattern: str = REASONING, *, which: str = "last", **options: Any) -> Reward:
    """1 for a text that contains a match of a regular expression (dots match line breaks).

    d1's reward of this name uses `re.match`, and its dots do not match line breaks, so it is almost never earned. This
    one searches, as MaskGRPO's does. Raises re.error for an invalid pattern.
    """
    compiled = re.compile(pattern, re.DOTALL)

    def judge(view: SegmentView) -> float:
        return float(compiled.search(view.text or "") is not None)

    return text_reward(judge, "soft_format", which, options)


@typed
def tag_count(tags: Sequence[str] = TAGS, *, which: str = "last", **options: Any) -> Reward:
    """The share of tags that occur exactly once in the text."""
    if not tags or not all(tags):
        raise ValueError(f"tags={tags!r}; name at least one, none of them empty")

    def judge(view: SegmentView) -> float:
        return sum((view.text or "").count(tag) == 1 for tag in tags) / len(tags)

    return text_reward(judge, "tag_count", which, options)


@typed
def boxed(*, which: str = "last", **options: Any) -> Reward:
    r"""1 for a text with a \boxed{…} that is not empty."""

    def judge(view: SegmentView) -> float:
        return float(bool(last_boxes(view.text or "")))

    return text_reward(judge, "boxed", which, options)


@typed
def integer(pattern: str | None = None, *, which: str = "last", **options: Any) -> Reward:
    r"""1 for an answer that is a whole number: digits, with or without a sign and commas between thousands.

    pattern: finds the answer (see `text.extract`); None = the last \boxed{}. MaskGRPO uses `str.isdigit`, which rejects
    "1,000" and "-3". Raises re.error for an invalid pattern.
    """
    re.compile(pattern or "")

    def judge(view: SegmentView) -> float:
        text = view.text or ""
        answer = "".join(last_boxes(text)[-1:]) if pattern is None else extract(text, pattern) or ""
        return float(_WHOLE.fullmatch(answer.strip()) is not None)

    return text_reward(judge, "integer", which, options)


for _name, _reward in {
    "soft_format": soft_format(),
    "tag_count": tag_count(),
    "boxed": boxed(),
    "integer": integer(),
}.items():
    register(_name)(_reward)
