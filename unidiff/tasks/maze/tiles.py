"""The tiles of a maze: 16 combinations of walls, with a marker (which hides a goal), a goal or nothing."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

CONTENTS = 3  # 0 nothing, 1 marker, 2 goal
_FINE = 128  # tiles are drawn at this size and shrunk, which smooths their edges
_FLOOR, _WALL, _GOAL, _MARKER = (250, 246, 232), (60, 66, 84), (46, 150, 90), (214, 60, 50)
_THICK = 10  # thickness of a wall inside one tile


@lru_cache
def tiles(side: int) -> np.ndarray:
    """uint8 [48, side, side, 3]: tile walls · CONTENTS + content; bit i of walls = a wall on side DIRECTIONS[i]."""
    drawn = np.stack([_tile(walls, content, side) for walls in range(16) for content in range(CONTENTS)])
    drawn.setflags(write=False)
    return drawn


def _tile(walls: int, content: int, side: int) -> np.ndarray:
    image = Image.new("RGB", (_FINE, _FINE), _FLOOR)
    pen, end = ImageDraw.Draw(image), _FINE - 1
    if content == 2:
        pen.rectangle((28, 28, end - 28, end - 28), fill=_GOAL)
    if content == 1:
        pen.ellipse((36, 36, end - 36, end - 36), fill=_MARKER)
    left, down, right, up = ((walls >> i) & 1 for i in range(4))
    for there, box in (
        (left, (0, 0, _THICK, end)),
        (down, (0, end - _THICK, end, end)),
        (right, (end - _THICK, 0, end, end)),
        (up, (0, 0, end, _THICK)),
    ):
        if there:
            pen.rectangle(box, fill=_WALL)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))
