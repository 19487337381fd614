"""Converts PIL images to pixels and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unidiff.images.picture import rgb


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size, of any mode (see `picture.rgb`) -> [B, 3, H, W] float32 in [0, 1].

    Raises ValueError for no image, or images of different sizes.
    """
    if not images:
        raise ValueError("images: expected at least one image, got none")
    images = [rgb(image) for image in images]
    if other := next((image.size for image in images if image.size != images[0].size), None):
        raise ValueError(f"images: expected one size, got {images[0].size} and {other}")
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous().float() / 255


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] float in [0, 1] (other values are clamped) -> B RGB images.

    Raises ValueError for another shape.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels: expected [B, 3, H, W], got {list(pixels.shape)}")
    rounded = (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in rounded.permute(0, 2, 3, 1).cpu().numpy()]
