"""The tiles of the sliding puzzle: the gap, and numerals or the pieces of a picture."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unidiff.tasks.puzzles.motif import pieces

_FINE = 128  # tiles are drawn at this size and shrunk, which smooths their edges
_GAP, _TILE, _RIM, _INK = (74, 78, 88), (238, 214, 160), (150, 110, 60), (40, 44, 60)


@lru_cache
def tiles(side: int, size: int, picture: str = "", gap: int = 0) -> np.ndarray:
    """uint8 [size², side, side, 3]: the gap, then tiles 1, 2, … picture: the motif on the tiles, "" = numerals. gap:
    index of the gap's solved cell, in reading order."""
    if picture:
        own = pieces(picture, size, side).reshape(-1, side, side, 3)
        faces = [face for place, face in enumerate(own) if place != gap]
    else:
        faces = [_numeral(number, side) for number in range(1, size**2)]
    empty = np.empty((side, side, 3), np.uint8)
    empty[:] = _GAP
    drawn = np.stack([empty, *faces])
    drawn.setflags(write=False)
    return drawn


def _numeral(number: int, side: int) -> np.ndarray:
    image = Image.new("RGB", (_FINE, _FINE), _RIM)
    pen, end = ImageDraw.Draw(image), _FINE - 1
    pen.rectangle((8, 8, end - 8, end - 8), fill=_TILE)
    font = ImageFont.load_default(size=104)
    pen.text((_FINE // 2, _FINE // 2), str(number), fill=_INK, font=font, anchor="mm", stroke_width=4)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))
