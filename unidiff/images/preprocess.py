"""Prepares a picture of any size for a tokenizer: resize rule, crop and filter, as data.

A rule first gives a `Placement` (plain numbers), so that a mask or a box in the picture's own pixels can be transformed
in the same way as the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from unidiff.config import check_fields
from unidiff.images.picture import rgb

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


@dataclass(frozen=True)
class Placement:
    """Resize to `resized` (width, height), then crop to `size` at `offset` (left, top)."""

    resized: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Preprocess:
    """A family's rule for preparing pictures.

    rule: "crop" = resize the short side to `size`, then crop the centre square. "squash" = resize to `size` x `size`.
    "multiple" = resize each side down to a multiple of `multiple` (`size` is not used). "buckets" = choose the bucket
    with the picture's nearest shape, resize the picture to cover it, and crop the centre. Buckets are the rectangles
    with sides in multiples of `multiple`, at most `size`² pixels (but more with one multiple added to both sides), and
    an aspect ratio of at most 4. (Lumina-DiMOO crops at random; we crop the centre.) resample: "bicubic" or "lanczos".
    """

    rule: Literal["crop", "squash", "multiple", "buckets"]
    size: int = 0
    multiple: int = 16
    resample: Literal["bicubic", "lanczos"] = "bicubic"

    def __post_init__(self) -> None:
        check_fields(self, "Preprocess.")
        if self.multiple < 1 or (self.rule != "multiple" and (self.size < 1 or self.size % self.multiple)):
            raise ValueError(f"Preprocess.size {self.size} must be a positive multiple of {self.multiple} (multiple)")

    def place(self, width: int, height: int) -> Placement:
        """The placement for a picture of this size. Raises ValueError if it has too few pixels for the rule."""
        if self.rule == "squash":
            return Placement((self.size, self.size), (0, 0), (self.size, self.size))
        if self.rule == "multiple":
            size = width // self.multiple * self.multiple, height // self.multiple * self.multiple
            if not all(size):
                raise ValueError(f"an image of {width} x {height} pixels is smaller than {self.multiple}; enlarge it")
            return Placement(size, (0, 0), size)
        if self.rule == "crop":
            # as torchvision's Resize and CenterCrop: the long side is truncated, the offset rounded
            short = min(width, height)
            resized = self.size * width // short, self.size * height // short
            return Placement(resized, _middle(resized, (self.size, self.size)), (self.size, self.size))
        size = self.bucket(width, height)
        halvings = self._halvings(width, height, size)
        width, height = width >> halvings, height >> halvings
        scale = max(size[0] / width, size[1] / height)
        resized = round(width * scale), round(height * scale)
        return Placement(resized, ((resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2), size)

    def buckets(self) -> list[tuple[int, int]]:
        """(width, height) of every rectangle of the rule "buckets"."""
        cells = (self.size // self.multiple) ** 2
        most = [(w, h) for w in range(1, cells + 1) for h in range(1, cells // w + 1) if (w + 1) * (h + 1) > cells]
        return [(w * self.multiple, h * self.multiple) for w, h in most if max(w, h) <= 4 * min(w, h)]

    def bucket(self, width: int, height: int) -> tuple[int, int]:
        """The bucket with the nearest shape; of two equally near ones, the larger."""

        def likeness(bucket: tuple[int, int]) -> tuple[float, tuple[int, int]]:
            x, y = bucket[0] / width, bucket[1] / height
            return min(x, y) / max(x, y), bucket

        return max(self.buckets(), key=likeness)

    def image(self, given: str | Path | bytes | Image.Image) -> Image.Image:
        """The prepared picture, in RGB. given: see `picture.rgb`. Raises ValueError if it has too few pixels."""
        image = rgb(given)
        placement = self.place(*image.size)
        if (most := Image.MAX_IMAGE_PIXELS) and placement.resized[0] * placement.resized[1] > most:
            raise ValueError(
                f"a picture of {image.width} x {image.height} pixels is too long for its width: the rule {self.rule!r} "
                f"would enlarge it to {placement.resized[0]} x {placement.resized[1]}; cut it first"
            )
        if self.rule == "buckets":  # very large pictures are averaged first
            for _ in range(self._halvings(*image.size, placement.size)):
                image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        return _cut(image, placement, _FILTERS[self.resample])

    def mask(self, mask: Image.Image) -> Image.Image:
        """Transforms a mask of the picture (mode "1" or "L"; nonzero = set) like the picture. Returns mode "1"."""
        if mask.mode not in ("1", "L"):
            raise ValueError(f"mask: expected mode 1 or L, got {mask.mode}; use mask.convert('L')")
        mask = mask.point(lambda value: 255 if value else 0, mode="1")
        return _cut(mask, self.place(*mask.size), Image.Resampling.NEAREST)

    def box(self, box: tuple[int, int, int, int], width: int, height: int) -> tuple[int, int, int, int]:
        """Transforms a box (top, left, bottom, right; half-open) from pixels of a picture to pixels of the prepared
        one, rounded outwards. Raises ValueError if the crop removes all of it."""
        top, left, bottom, right = box
        if not (0 <= top < bottom <= height and 0 <= left < right <= width):
            raise ValueError(f"box {box}: needs 0 <= top < bottom <= {height} and 0 <= left < right <= {width}")
        place = self.place(width, height)
        (x, y), (low_x, low_y) = place.resized, place.offset
        moved = (
            max(top * y // height - low_y, 0),
            max(left * x // width - low_x, 0),
            min(-(-bottom * y // height) - low_y, place.size[1]),
            min(-(-right * x // width) - low_x, place.size[0]),
        )
        if moved[0] >= moved[2] or moved[1] >= moved[3]:
            raise ValueError(f"box {box}: the prepared picture shows nothing of it")
        return moved

    @staticmethod
    def _halvings(width: int, height: int, size: tuple[int, int]) -> int:
        """How often a picture is halved by averaging before it is resized to cover `size`."""
        count = 0
        while width >> count >= 2 * size[0] and height >> count >= 2 * size[1]:
            count += 1
        return count


def _middle(resized: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    return round((resized[0] - size[0]) / 2), round((resized[1] - size[1]) / 2)


def _cut(image: Image.Image, place: Placement, resample: Image.Resampling) -> Image.Image:
    left, top = place.offset
    return image.resize(place.resized, resample).crop((left, top, left + place.size[0], top + place.size[1]))
