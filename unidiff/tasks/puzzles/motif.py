"""Pictures to cut into pieces; each piece shows where it belongs."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

GROUND = (236, 232, 220)
COLOURS = {"red": (206, 62, 54), "green": (58, 146, 84), "blue": (52, 96, 190)}
SHAPES = ("disc", "diamond")
MOTIFS = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
_FINE = 8  # pictures are drawn larger by this factor and shrunk, which smooths their edges


@lru_cache
def pieces(motif: str, size: int, side: int) -> np.ndarray:
    """uint8 [size, size, side, side, 3]: a motif, cut into size x size pieces. Raises ValueError for a motif that is
    not in MOTIFS."""
    if motif not in MOTIFS:
        raise ValueError(f"motif: expected one of {', '.join(MOTIFS)}, got {motif!r}")
    colour, shape = motif.split()
    whole = size * side * _FINE
    image = Image.new("RGB", (whole, whole), GROUND)
    pen, edge, middle = ImageDraw.Draw(image), whole // 24, whole // 2
    if shape == "disc":
        pen.ellipse((edge, edge, whole - 1 - edge, whole - 1 - edge), fill=COLOURS[colour])
    else:
        last = whole - 1 - edge
        pen.polygon([(middle, edge), (last, middle), (middle, last), (edge, middle)], fill=COLOURS[colour])
    pixels = np.asarray(image.resize((size * side, size * side), Image.Resampling.BOX))
    cut = np.ascontiguousarray(pixels.reshape(size, side, size, side, 3).transpose(0, 2, 1, 3, 4))
    cut.setflags(write=False)
    return cut
