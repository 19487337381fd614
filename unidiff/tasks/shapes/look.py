"""Reads shapes out of pictures: which shapes a picture shows, where, and how clearly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from unidiff.tasks.shapes.scene import COLOURS, GROUND, KINDS, SIDE, SIZE, outline

_SPECK = 12  # a blot of fewer pixels is a speck of the image tokenizer, not a shape


@dataclass(frozen=True)
class Seen:
    """One shape in a picture.

    left, top, right, bottom: pixels of its box, the last two exclusive.
    fit: overlap (intersection over union) with the outline of its kind in the same box, 0 to 1.
    """

    kind: str
    colour: str
    left: int
    top: int
    right: int
    bottom: int
    fit: float

    @property
    def centre(self) -> tuple[float, float]:
        """x, y in pixels."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    @property
    def clear(self) -> bool:
        """Whether it has the size and the outline of a shape."""
        sides = (self.right - self.left, self.bottom - self.top)
        return self.fit >= 0.7 and all(abs(side - SIZE) <= 3 for side in sides)


def look(pictures: Sequence[Image.Image]) -> list[list[Seen]]:
    """The shapes in each picture, in reading order of their upper left corners.

    Raises ValueError unless every picture is RGB with SIDE x SIDE pixels.
    """
    for picture in pictures:
        if picture.mode != "RGB" or picture.size != (SIDE, SIDE):
            raise ValueError(f"expected RGB pictures of {SIDE} x {SIDE} pixels, got {picture.mode} {picture.size}")
    if not pictures:
        return []
    colours = _colours(np.stack([np.asarray(picture) for picture in pictures]))
    return [[_seen(colour, pixels) for colour, pixels in _blots(each)] for each in colours]


def _colours(pixels: np.ndarray) -> np.ndarray:
    """[N, H, W, 3] uint8 -> int [N, H, W]: the index of each pixel's colour in COLOURS, -1 = ground.

    An edge pixel is a mixture: ground + a (colour - ground). So the colour is the one whose line the pixel is
    nearest to, and the pixel belongs to the shape if a is at least a half.
    """
    lines = np.array(list(COLOURS.values()), np.float32) - np.array(GROUND, np.float32)
    offset = pixels.astype(np.float32) - np.array(GROUND, np.float32)
    share = np.clip(offset @ lines.T / (lines**2).sum(-1), 0, 1)
    miss = ((offset[..., None, :] - share[..., None] * lines) ** 2).sum(-1)
    nearest = miss.argmin(-1)
    covered = np.take_along_axis(share, nearest[..., None], -1)[..., 0] >= 0.5
    return np.where(covered, nearest, -1)


def _blots(colours: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """[H, W] -> (colour, [n, 2] rows and columns) of each connected run of one colour (four neighbours)."""
    covered = colours >= 0
    place = np.where(covered, np.arange(colours.size).reshape(colours.shape), colours.size)
    down, across = (colours[1:] == colours[:-1]) & covered[1:], (colours[:, 1:] == colours[:, :-1]) & covered[:, 1:]
    while True:  # every pixel takes the least place of its neighbours, until nothing changes
        before = place.copy()
        for ahead, behind, same in ((place[1:], place[:-1], down), (place[:, 1:], place[:, :-1], across)):
            np.minimum(ahead, behind, out=ahead, where=same)
            np.minimum(behind, ahead, out=behind, where=same)
        if (place == before).all():
            break
    blots = []
    for first in np.unique(place[covered]):
        pixels = np.argwhere(place == first)
        if len(pixels) >= _SPECK:
            blots.append((int(colours.flat[first]), pixels))
    return blots


def _seen(colour: int, pixels: np.ndarray) -> Seen:
    (top, left), (bottom, right) = pixels.min(0), pixels.max(0) + 1
    mask = np.zeros((bottom - top, right - left), bool)
    mask[pixels[:, 0] - top, pixels[:, 1] - left] = True
    fits = [(mask & shape).sum() / (mask | shape).sum() for shape in _outlines(*mask.shape)]
    best = int(np.argmax(fits))
    box = (int(left), int(top), int(right), int(bottom))
    return Seen(KINDS[best], list(COLOURS)[colour], *box, fit=float(fits[best]))


@lru_cache(maxsize=1024)
def _outlines(height: int, width: int) -> np.ndarray:
    """[kinds, height, width] bool: the outlines stretched to a box."""
    rows, columns = np.arange(height) * SIZE // height, np.arange(width) * SIZE // width
    return np.stack([outline(kind)[rows[:, None], columns] for kind in KINDS])
