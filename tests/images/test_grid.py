"""Pixels to tokens of the grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tables import each
from unidiff.images import grid


@each("seed", range(20))
def test_a_box_is_the_mask_of_its_pixels(seed):
    rng = np.random.default_rng(seed)
    rows, columns, factor = rng.integers(1, 6, 3)
    height, width = int(rows * factor), int(columns * factor)
    (top, bottom), (left, right) = (np.sort(rng.choice(n + 1, 2, replace=False)) for n in (height, width))
    pixels = np.zeros((height, width), bool)
    pixels[top:bottom, left:right] = True
    tokens = grid.from_box((int(top), int(left), int(bottom), int(right)), (height, width), int(factor))
    assert tokens.dtype == torch.bool and tokens.shape == (rows, columns)
    assert torch.equal(tokens, grid.from_pixels(pixels, int(factor)))
    touched = {(y // factor, x // factor) for y, x in zip(*np.nonzero(pixels))}
    assert {tuple(place) for place in tokens.nonzero().tolist()} == touched


def test_share_of_the_pixels():
    pixels = torch.zeros(4, 8)
    pixels[:2, :4], pixels[:3, 4:] = 255, 1  # half of the one token, three quarters of the other
    assert grid.from_pixels(pixels, 4).tolist() == [[True, True]]
    assert grid.from_pixels(pixels, 4, share=0.5).tolist() == [[False, True]]
    assert grid.from_pixels(pixels, 4, share=0.75).tolist() == [[False, False]]
    image = Image.fromarray(pixels.numpy().astype(np.uint8))
    assert grid.from_pixels(image, 4, share=0.5).tolist() == [[False, True]]
    assert grid.from_pixels(image.point(lambda v: 255 * (v > 0), mode="1"), 4).tolist() == [[True, True]]


def test_grow():
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[0, 1] = mask[4, 5] = True
    near = [[max(abs(y - a), abs(x - b)) for a, b in ((0, 1), (4, 5))] for y in range(5) for x in range(6)]
    for by in range(4):
        assert grid.grow(mask, by).flatten().tolist() == [min(distances) <= by for distances in near]
    with pytest.raises(ValueError, match="tokens: expected 0 or more"):
        grid.grow(mask, -1)


def test_bad_input():
    for box in ((0, 0, 0, 4), (-1, 0, 4, 4), (0, 0, 9, 4), (0, 4, 4, 2), (0, 0, 4, 13)):
        with pytest.raises(ValueError, match="needs 0 <= top < bottom <= 8 and 0 <= left < right <= 12"):
            grid.from_box(box, (8, 12), 4)
    with pytest.raises(ValueError, match="sides must be multiples of 4, got 8 x 10"):
        grid.from_box((0, 0, 4, 4), (8, 10), 4)
    with pytest.raises(ValueError, match="sides must be multiples of 4, got 2 x 8"):
        grid.from_pixels(torch.zeros(2, 8), 4)
    with pytest.raises(ValueError, match=r"mask: expected \[H, W\], got \[1, 8, 8\]"):
        grid.from_pixels(torch.zeros(1, 8, 8), 4)
    with pytest.raises(ValueError, match="mask: expected mode 1 or L, got RGB"):
        grid.from_pixels(Image.new("RGB", (8, 8)), 4)
    with pytest.raises(ValueError, match="share: expected a number from 0 to below 1, got 1"):
        grid.from_pixels(torch.zeros(8, 8), 4, share=1)
