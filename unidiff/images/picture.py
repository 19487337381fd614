"""Converts external pictures to RGB."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Formats that are read from files. Pillow has more; some start other programs (EPS) or are rarely maintained.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


def rgb(given: str | Path | bytes | Image.Image, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Converts a file, its bytes, or a PIL image of any mode to RGB, as a viewer would show it.

    - EXIF orientation is applied.
    - Transparency is composited on white.
    - Of an animation or several pages, the first is taken (of a PIL image, the current one).
    - A 16-bit grey picture is scaled from 0..65535. Wider modes (I and F) do not define a range: floats in [0, 1] are
      scaled from 0..1; whole numbers up to 255 count as 8 bits, up to 65535 as 16 bits; other values are refused.

    formats: Pillow's names. Raises FileNotFoundError for a missing file, ValueError with the file's name for another
    format, a damaged file, no pixels, more than `PIL.Image.MAX_IMAGE_PIXELS`, and refused values.
    """
    if isinstance(given, Image.Image):
        try:
            return _upright_rgb(given)
        except OSError as error:  # its file is read lazily
            raise ValueError(f"the picture is not one that can be read ({error})") from error
    if isinstance(given, str | Path):
        source, name = Path(given), str(given)
        if not os.path.isfile(source):
            raise FileNotFoundError(f"{name} is not a file" if os.path.exists(source) else f"{name} does not exist")
    elif isinstance(given, bytes | bytearray | memoryview):
        source, name = io.BytesIO(given), f"a picture of {len(given)} bytes"
    else:
        raise TypeError(f"a picture is a file's path, its bytes or a PIL image, not {type(given).__name__}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source, formats=formats) as image:
                return _upright_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture that can be read: formats are {', '.join(formats)}") from error
    except Exception as error:  # damaged files raise anything
        raise ValueError(f"{name} is not a picture that can be read ({error})") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if not all(image.size):
        raise ValueError(f"a picture of {image.width} x {image.height} pixels shows nothing")
    scaled = image.format == "PPM"  # Pillow scaled it from the file's range to 0..65535
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _in_8_bits(image, scaled)
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"a picture of mode {image.mode} cannot be shown in RGB; convert it") from error


def _in_8_bits(image: Image.Image, scaled: bool) -> Image.Image:
    """A one-channel picture of 16 or 32 bits as mode L, by the rule of `rgb`. scaled: whole numbers are 0..65535."""
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(initial=0), values.max(initial=0)  # NaN if one is
    if image.mode.startswith("I;16") or (scaled and image.mode == "I"):
        top = 65535
    elif image.mode == "F" and low >= 0 and high <= 1:
        top = 1
    elif low >= 0 and high <= 65535 and (values == np.floor(values)).all():
        top = 255 if high <= 255 else 65535
    else:
        raise ValueError(
            f"its values of mode {image.mode} go from {low:g} to {high:g}: expected floats from 0 to 1, or whole "
            "numbers from 0 to 65535; scale them first"
        )
    if isinstance(clear := image.info.get("transparency"), int):  # a PNG's transparent value
        values[values == clear] = top
    return Image.fromarray(np.rint(values * 255 / top).astype(np.uint8))
