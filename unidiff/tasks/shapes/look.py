"""Detects shapes in pictures: kind, colour, place and clarity."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from unidiff.tasks.shapes.scene import COLOURS, GROUND, KINDS, SIDE, SIZE, outline

_SPECK = 12  # a blot of fewer pixels is an artefact of the image tokenizer, not a shape


@dataclass(frozen=True)
class Seen:
    """One shape in a picture.

    left, top, right, bottom: pixels of its box, the last two exclusive.
    fit: overlap (intersection over union) with the outline of its kind, 0 to 1.
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
        """Whether its size and outline are those of a shape."""
        sides = (self.right - self.left, self.bottom - self.top)
        return self.fit >= 0.7 and all(abs(side - SIZE) <= 3 for side in sides)


def look(pictures: Sequence[Image.Image]) -> list[list[Seen]]:
    """The shapes in each picture, in reading order.

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

    An edge pixel is a mixture: ground + a (colour - ground). It gets the colour with the nearest such line, and belongs
    to the shape if a >= 1/2.
    """
    lines = np.array(list(COLOURS.values()), np.float32) - np.array(GROUND, np.float32)
    offset = pixels.astype(np.float32) - np.array(GROUND, np.float32)
    share = np.clip(offset @ lines.T / (lines**2).sum(-1), 0, 1)
    miss = ((offset[..., None, :] - share[..., None] * lines) ** 2).sum(-1)
    nearest = miss.argmin(-1)
    covered = np.take_along_axis(share, nearest[..., None], -1)[..., 0] >= 0.5
    return np.where(covered, nearest, -1)


def _blots(colours: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """[H, W] -> (colour, [n, 2] rows and columns) of each connected area of one colour (four neighbours)."""
    covered = colours >= 0
    place = np.where(covered, np.arange(colours.size).reshape(colours.shape), colours.size)
    down, across = (colours[1:] == colours[:-1]) & covered[1:], (colours[:, 1:] == colours[:, :-1]) & covered[:, 1:]
    while True:  # each pixel takes its neighbours' minimum, until nothing changes
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
    fits = [_overlap(mask, kind) for kind in KINDS]
    best = int(np.argmax(fits))
    box = (int(left), int(top), int(right), int(bottom))
    return Seen(KINDS[best], list(COLOURS)[colour], *box, fit=float(fits[best]))


def _overlap(mask: np.ndarray, kind: str) -> float:
    """Intersection over union of a blot and an outline, with box centres aligned to half a pixel. The outline is not
    scaled, so a blot whose tips the image tokenizer lost still matches."""
    best = 0.0
    height, width = mask.shape
    for top, left in itertools.product(*({(n - SIZE) // 2, (n - SIZE + 1) // 2} for n in (height, width))):
        rows = slice(max(top, 0), min(top + SIZE, height))
        columns = slice(max(left, 0), min(left + SIZE, width))
        inside = outline(kind)[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        both = int((mask[rows, columns] & inside).sum())
        best = max(best, both / (int(mask.sum()) + int(outline(kind).sum()) - both))
    return best
