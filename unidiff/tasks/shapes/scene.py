"""Scenes: a few coloured shapes on a plain ground, and their drawing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64  # pixels of a picture's side
SIZE = 14  # pixels of a shape's side
# A shape is centred on 2 x 2 patches of 8 pixels. So there are only 121 different patches, and each has its own code in
# the native image tokenizer.
LATTICE, INSET = 8, 1
GAP = 2  # minimum pixels between two shapes
GROUND = (244, 242, 236)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 200, 20),
    "purple": (140, 60, 180),
    "black": (40, 40, 44),
}
KINDS = ("circle", "square", "triangle", "cross", "diamond")
_FINE = 8  # a shape is drawn larger by this factor and shrunk, which smooths its edges


@dataclass(frozen=True)
class Shape:
    """One shape. x, y: pixels from the picture's left and upper edge to the shape's box."""

    kind: str
    colour: str
    x: int
    y: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.colour not in COLOURS:
            raise ValueError(f"colour: expected one of {', '.join(COLOURS)}, got {self.colour!r}")
        if not (0 <= self.x <= SIDE - SIZE and 0 <= self.y <= SIDE - SIZE):
            raise ValueError(f"x, y: expected 0 to {SIDE - SIZE}, got {self.x}, {self.y}")

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}"


def apart(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether the boxes of two shapes, given by their upper left corners, leave a gap."""
    return max(abs(a - b) for a, b in zip(one, other)) >= SIZE + GAP


def draw(shapes: tuple[Shape, ...]) -> Image.Image:
    """The picture of a scene: RGB, SIDE x SIDE pixels. Later shapes cover earlier ones."""
    picture = Image.new("RGB", (SIDE, SIDE), GROUND)
    for shape in shapes:
        picture.paste(COLOURS[shape.colour], (shape.x, shape.y), _stencil(shape.kind))
    return picture


@lru_cache
def outline(kind: str) -> np.ndarray:
    """[SIZE, SIZE] bool: the pixels of its box that a shape covers."""
    return np.asarray(_stencil(kind)) > 127


@lru_cache
def _stencil(kind: str) -> Image.Image:
    """A shape's coverage of the pixels of its box, 0 to 255."""
    side = SIZE * _FINE
    stencil = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(stencil)
    end, third = side - 1, side // 3
    if kind == "circle":
        pen.ellipse((0, 0, end, end), fill=255)
    elif kind == "square":
        pen.rectangle((0, 0, end, end), fill=255)
    elif kind == "triangle":
        pen.polygon([(0, end), (end, end), (side // 2, 0)], fill=255)
    elif kind == "diamond":
        pen.polygon([(0, side // 2), (side // 2, 0), (end, side // 2), (side // 2, end)], fill=255)
    else:
        pen.rectangle((third, 0, end - third, end), fill=255)
        pen.rectangle((0, third, end, end - third), fill=255)
    return stencil.resize((SIZE, SIZE), Image.Resampling.BOX)
