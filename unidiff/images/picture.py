"""A picture from outside, as the RGB picture that everything here works on."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# What is read from files. Pillow knows more; some of them start other programs (EPS) or are rarely maintained.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


def rgb(given: str | Path | bytes | Image.Image, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """A file, its bytes, or a PIL image of any mode -> mode RGB, as a viewer would show it.

    - Turned upright, as its EXIF orientation says.
    - What is transparent is laid on white.
    - Of an animation or several pages the first is taken (of a PIL image the present one).
    - A 16-bit grey picture is scaled from 0..65535. Wider numbers (modes I and F) do not say their range: floats from
      0 to 1 are shares; whole numbers up to 255, or else up to 65535, are values of 8 or 16 bits; others are refused.

    formats: names of Pillow's. Raises FileNotFoundError for a missing file, and ValueError with the file's name for
    another format, a damaged file, no pixels, more than `PIL.Image.MAX_IMAGE_PIXELS`, and values that are refused.
    """
    if isinstance(given, Image.Image):
        try:
            return _upright_rgb(given)
        except OSError as error:  # of a file that is read only now
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
    scaled = image.format == "PPM"  # its file says the range, and Pillow has scaled that to 0..65535
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
    """A picture of one channel of 16 or 32 bits as mode L, by the rule of `rgb`. scaled: whole numbers are 0..65535."""
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
    if isinstance(clear := image.info.get("transparency"), int):  # the one value that a PNG shows as nothing
        values[values == clear] = top
    return Image.fromarray(np.rint(values * 255 / top).astype(np.uint8))
