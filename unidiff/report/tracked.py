"""Logs a few rollouts of a step to trackers, as strips of pictures and a table of texts and rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from unidiff.rewards.segment_view import SegmentView, parts_of
from unidiff.rewards.table import RewardTable

SHOWN = 8  # rollouts of a step
_GAP = 4  # white pixels between pictures
COLUMNS = ("prompt", "response", "rewards")

Row = tuple[SegmentView, ...]


def log_rollouts(trackers: Sequence[Any], rows: Sequence[Row], table: RewardTable, step: int) -> None:
    """Logs the first rollouts to accelerate's trackers, under "rollouts/…". Trackers without pictures or tables get
    only the texts."""
    rows = rows[:SHOWN]
    strips = strips_of(rows)
    texts = [[*_words(row), _earned(table, i)] for i, row in enumerate(rows)]
    for tracker in trackers:
        if strips is not None and hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"rollouts/pictures": strips}, step=step, **layout)
        if hasattr(tracker, "log_table"):
            tracker.log_table("rollouts/texts", columns=list(COLUMNS), data=texts, step=step)
        else:
            tracker.log({"rollouts/texts": "\n\n".join(" | ".join(line) for line in texts)}, step=step)


def strips_of(rows: Sequence[Row]) -> np.ndarray | None:
    """uint8 [N, H, W, 3]: each rollout's pictures (prompt, then response) from left to right; None if no rollout has
    a picture."""
    pictures = [[part for _, part in parts_of(row[-1]) if isinstance(part, Image.Image)] for row in rows]
    if not any(pictures):
        return None
    height = max(picture.height for some in pictures for picture in some)
    width = max(sum(picture.width + _GAP for picture in some) for some in pictures)
    strips = np.full((len(rows), height, width, 3), 255, np.uint8)
    for strip, some in zip(strips, pictures):
        at = 0
        for picture in some:
            strip[: picture.height, at : at + picture.width] = np.asarray(picture.convert("RGB"))
            at += picture.width + _GAP
    return strips


def _words(row: Row) -> list[str]:
    """The texts of the prompt and of the response; a picture is "[picture]"."""
    said: dict[str, list[str]] = {"prompt": [], "response": []}
    for role, part in parts_of(row[-1]):
        said[role].append(part if isinstance(part, str) else "[picture]")
    return [" ".join(parts) for parts in said.values()]


def _earned(table: RewardTable, row: int) -> str:
    values = zip(table.names, table.row_means_BF[row].tolist())
    return ", ".join(f"{name} {value:.3g}" for name, value in values if not math.isnan(value))
