"""The position of a board's cells in its picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from unidiff.tasks.cells import Cell

GROUND = (244, 242, 236)  # colour around the cells


@dataclass(frozen=True)
class Frame:
    """size x size cells, centred in a picture of side x side pixels, with `step` pixels per token. A cell is a whole
    number of tokens wide, as large as fits. Raises ValueError if the picture has fewer tokens than cells per side."""

    size: int
    side: int
    step: int = 8

    def __post_init__(self) -> None:
        if self.side % self.step or self.side // self.step < self.size:
            raise ValueError(
                f"size: a picture of {self.side} pixels has {self.side // self.step} tokens a side, too few for "
                f"{self.size} cells"
            )

    @property
    def tile(self) -> int:
        """Pixels of a cell's side."""
        return self.side // self.step // self.size * self.step

    @property
    def margin(self) -> int:
        """Pixels to the left of the cells and above them."""
        return (self.side - self.size * self.tile) // self.step // 2 * self.step

    def draw(self, tiles: np.ndarray) -> Image.Image:
        """A picture of tiles uint8 [size, size, tile, tile, 3]."""
        picture = np.full((self.side, self.side, 3), GROUND, np.uint8)
        end = self.margin + self.size * self.tile
        board = tiles.transpose(0, 2, 1, 3, 4).reshape(self.size * self.tile, -1, 3)
        picture[self.margin : end, self.margin : end] = board
        return Image.fromarray(picture)

    def cells(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> [size, size, tile, tile, 3]. Raises ValueError for a picture of another size."""
        if pixels.dtype != np.uint8 or pixels.shape != (self.side, self.side, 3):
            raise ValueError(
                f"pixels: expected uint8 [{self.side}, {self.side}, 3], got {pixels.dtype} {list(pixels.shape)}"
            )
        end = self.margin + self.size * self.tile
        board = pixels[self.margin : end, self.margin : end]
        return board.reshape(self.size, self.tile, self.size, self.tile, 3).transpose(0, 2, 1, 3, 4)

    def region(self, cells: Iterable[Cell], grid: tuple[int, int]) -> np.ndarray:
        """[rows, columns] bool: the image tokens of some cells. Raises ValueError if the picture has another grid."""
        tokens = self.side // self.step
        if tuple(grid) != (tokens, tokens):
            raise ValueError(f"grid: expected {tokens} x {tokens} tokens, got {grid[0]} x {grid[1]}")
        named, wide, first = np.zeros(grid, bool), self.tile // self.step, self.margin // self.step
        for row, column in cells:
            top, left = first + row * wide, first + column * wide
            named[top : top + wide, left : left + wide] = True
        return named


def nearest(cells: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """[size, size] int: the index of the nearest of tiles [C, tile, tile, 3] for cells [size, size, tile, tile, 3]."""
    seen = cells.reshape(*cells.shape[:2], -1).astype(np.float32)
    known = tiles.reshape(len(tiles), -1).astype(np.float32)
    # argmin |x - t|² = argmin |t|² - 2 x·t
    return ((known**2).sum(-1) - 2 * seen @ known.T).argmin(-1)
