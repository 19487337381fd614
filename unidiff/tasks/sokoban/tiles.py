"""The tiles of Sokoban: wall; floor and box, each with or without a target; and the worker, who hides a target."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

# A class is WALL, or the cell's content, plus TARGET if floor or box is on a target.
FLOOR, BOX, AGENT, TARGET, WALL = 0, 1, 2, 3, 6
_FINE = 128  # tiles are drawn at this size and shrunk, which smooths their edges


@lru_cache
def tiles(side: int) -> np.ndarray:
    """uint8 [7, side, side, 3]."""
    drawn = np.stack([_tile(what, side) for what in range(WALL + 1)])
    drawn.setflags(write=False)
    return drawn


def _tile(what: int, side: int) -> np.ndarray:
    image = Image.new("RGB", (_FINE, _FINE), (222, 214, 196))
    pen, end = ImageDraw.Draw(image), _FINE - 1
    if what == WALL:
        pen.rectangle((0, 0, end, end), fill=(104, 84, 76))
        for y in (0, 64):
            pen.rectangle((0, y + 52, end, y + 63), fill=(72, 56, 52))
            pen.rectangle((58 + y // 2, y, 69 + y // 2, y + 52), fill=(72, 56, 52))
    else:
        on, target = what % TARGET, what >= TARGET
        if target:
            pen.rectangle((6, 6, end - 6, end - 6), outline=(208, 60, 60), width=14)
        if on == BOX:
            pen.rectangle((26, 26, end - 26, end - 26), fill=(204, 140, 56), outline=(120, 76, 24), width=10)
            pen.line((34, 34, end - 34, end - 34), fill=(120, 76, 24), width=10)
        elif on == AGENT:
            pen.ellipse((28, 28, end - 28, end - 28), fill=(48, 92, 190))
            pen.ellipse((46, 40, 80, 74), fill=(248, 212, 176))
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))
