"""Token masks for edits, from boxes and pixel masks.

A mask is [rows, columns] bool, True = sampled again. It covers only image tokens, not delimiters or row separators.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def from_box(box: tuple[int, int, int, int], size: tuple[int, int], factor: int) -> Tensor:
    """The tokens that a box of pixels touches.

    box: top, left, bottom, right, half-open, in pixels. size: height and width of the image. Raises ValueError for a
    box that is empty or exceeds the image, and for a size that is not a multiple of the tokenizer's factor.
    """
    top, left, bottom, right = box
    if not (0 <= top < bottom <= size[0] and 0 <= left < right <= size[1]):
        raise ValueError(f"box {box}: needs 0 <= top < bottom <= {size[0]} and 0 <= left < right <= {size[1]}")
    mask = torch.zeros(grid_of(size, factor), dtype=torch.bool)
    mask[top // factor : -(-bottom // factor), left // factor : -(-right // factor)] = True
    return mask


def from_pixels(mask: Tensor | np.ndarray | Image.Image, factor: int, share: float = 0.0) -> Tensor:
    """The tokens of which more than `share` of the pixels are set: 0 = any, 0.5 = most (Lumina-DiMOO's rule).

    mask: [H, W], or an image of mode "1" or "L"; nonzero = set. Raises ValueError for another shape, and for sides that
    are not multiples of the tokenizer's factor.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share: expected a number from 0 to below 1, got {share}")
    if isinstance(mask, Image.Image):
        if mask.mode not in ("1", "L"):
            raise ValueError(f"mask: expected mode 1 or L, got {mask.mode}; use mask.convert('L')")
        mask = np.array(mask)
    pixels = torch.as_tensor(mask)
    if pixels.ndim != 2:
        raise ValueError(f"mask: expected [H, W], got {list(pixels.shape)}")
    rows, columns = grid_of((pixels.shape[0], pixels.shape[1]), factor)
    count = (pixels != 0).reshape(rows, factor, columns, factor).sum((1, 3))
    return count > share * factor**2


def grow(mask: Tensor, tokens: int = 1) -> Tensor:
    """Dilates the mask by a number of tokens on each side, diagonals included. A convolutional tokenizer's tokens also
    depend on neighbouring pixels, so neighbours should be sampled again too."""
    if tokens < 0:
        raise ValueError(f"tokens: expected 0 or more, got {tokens}")
    return F.max_pool2d(mask[None].float(), 2 * tokens + 1, stride=1, padding=tokens)[0].bool()


def grid_of(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Rows and columns of an image of (height, width) pixels. Raises ValueError if `factor` does not divide them."""
    height, width = size
    if height < factor or width < factor or height % factor or width % factor:
        raise ValueError(f"image size: sides must be multiples of {factor}, got {height} x {width}; resize it")
    return height // factor, width // factor
