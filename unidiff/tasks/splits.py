"""Disjoint splits for tasks that generate their examples."""

from __future__ import annotations

import hashlib
import random
from typing import Any

SPLITS = ("train", "dev", "test")


def split_of(text: str) -> str:
    """The split of a prompt, by its hash: 80 % train, 10 % dev, 10 % test."""
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10
    return "train" if place < 8 else SPLITS[place - 7]


def generator(use: str, split: str, index: int, *more: int) -> random.Random:
    """A random generator for one use of one example. Raises ValueError for an unknown split or a negative index."""
    check_place(split, index)
    return random.Random(repr((use, split, index, *more)))


def check_place(split: str, index: Any) -> None:
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if index < 0:
        raise ValueError(f"index: expected 0 or more, got {index}")
