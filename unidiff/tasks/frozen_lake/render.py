"""Pictures of frozen-lake boards: drawing them, and reading them back by the nearest tile.

A board is drawn from 16 tiles: 8 cell classes on two shades of ice that alternate like a chessboard. With only 16
tiles, a small VQ tokenizer needs only a small codebook.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from unidiff.tasks.frozen_lake.board import CLASSES, LETTERS

SHADES = 2
_FINE = 128  # tiles are drawn at this size and shrunk, which smooths their edges
_ICE = ((206, 230, 245), (188, 218, 240))
_STREAK = ((240, 249, 255), (224, 241, 252))
_FROST = ((172, 204, 228), (154, 190, 218))


def check_tile(tile: int) -> None:
    """Raises ValueError unless `tile` is a valid side of a tile in pixels."""
    if tile % 8 or not 8 <= tile <= _FINE:
        raise ValueError(f"tile: expected a multiple of 8 from 8 to {_FINE} pixels, got {tile}")


def draw(classes: np.ndarray, tile: int = 16) -> np.ndarray:
    """Draws boards: classes [N, size, size] -> pixels uint8 [N, size * tile, size * tile, 3]."""
    boards, size, _ = classes.shape
    cells = _tiles(tile)[_shades(size), classes].transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(cells).reshape(boards, size * tile, size * tile, 3)


def read(pixels: np.ndarray, size: int, tile: int = 16) -> np.ndarray:
    """Reads boards by the nearest tile: pixels uint8 [N, H, W, 3] -> classes int64 [N, size, size].

    Raises ValueError if the pixels are not uint8 RGB pictures with sides of size * tile pixels.
    """
    side = size * tile
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (side, side, 3):
        raise ValueError(
            f"pixels: expected uint8 [N, {side}, {side}, 3] for {size} x {size} cells of {tile} pixels, "
            f"got {pixels.dtype} {list(pixels.shape)}"
        )
    cells = pixels.reshape(-1, size, tile, size, tile, 3).transpose(0, 1, 3, 2, 4, 5)
    cells = cells.reshape(-1, size, size, tile * tile * 3).astype(np.float32)
    templates = _tiles(tile).reshape(SHADES, CLASSES, -1)[_shades(size)].astype(np.float32)
    # argmin |x - t|² = argmin |t|² - 2 x·t, over the tiles with the cell's shade of ice
    gaps = (templates**2).sum(-1) - 2 * np.einsum("nijp,ijcp->nijc", cells, templates, optimize=True)
    return gaps.argmin(-1)


def _shades(size: int) -> np.ndarray:
    """[size, size]: the index of each cell's shade of ice."""
    return np.indices((size, size)).sum(0) % SHADES


@lru_cache
def _tiles(tile: int) -> np.ndarray:
    """uint8 [shades, classes, tile, tile, 3]: all tiles."""
    check_tile(tile)
    tiles = [[_draw_tile(c, shade, tile) for c in range(CLASSES)] for shade in range(SHADES)]
    stacked = np.stack([np.stack(row) for row in tiles])
    stacked.setflags(write=False)
    return stacked


def _draw_tile(cell_class: int, shade: int, tile: int) -> np.ndarray:
    """uint8 [tile, tile, 3]: one cell class on one shade of ice."""
    letter, agent = LETTERS[cell_class // 2], bool(cell_class % 2)
    image = Image.new("RGB", (_FINE, _FINE), _ICE[shade])
    pen = ImageDraw.Draw(image)
    _draw_ice(pen, shade)
    if letter == "H":
        _draw_hole(pen)
    elif letter == "S":
        _draw_start(pen)
    elif letter == "G":
        _draw_goal(pen)
    if agent:
        _draw_agent(pen, sunk=letter == "H")
    return np.asarray(image.resize((tile, tile), Image.Resampling.BOX))


def _draw_ice(pen: ImageDraw.ImageDraw, shade: int) -> None:
    streaks = [(16, 52, 52, 16), (28, 64, 48, 44), (80, 112, 112, 80)]
    for x0, y0, x1, y1 in streaks:
        # the second shade's streaks are mirrored, so that neighbours do not look stamped
        line = (x0, y0, x1, y1) if shade == 0 else (_FINE - x0, y0, _FINE - x1, y1)
        pen.line(line, fill=_STREAK[shade], width=8)
    pen.line((0, _FINE - 4, _FINE, _FINE - 4), fill=_FROST[shade], width=8)
    pen.line((_FINE - 4, 0, _FINE - 4, _FINE), fill=_FROST[shade], width=8)


def _draw_hole(pen: ImageDraw.ImageDraw) -> None:
    pen.ellipse((8, 10, 116, 116), fill=(240, 250, 255))
    pen.ellipse((14, 18, 110, 112), fill=(24, 58, 104))
    pen.ellipse((24, 34, 102, 108), fill=(10, 28, 62))
    pen.arc((36, 52, 92, 98), 200, 300, fill=(58, 104, 160), width=7)


def _draw_start(pen: ImageDraw.ImageDraw) -> None:
    pen.rounded_rectangle((6, 6, 114, 114), 14, fill=(128, 92, 58))
    pen.rounded_rectangle((14, 14, 106, 106), 8, fill=(196, 154, 104))
    for y in (38, 62, 86):
        pen.line((14, y, 106, y), fill=(150, 110, 70), width=7)


def _draw_goal(pen: ImageDraw.ImageDraw) -> None:
    pen.rounded_rectangle((6, 6, 114, 114), 14, fill=(30, 132, 84))
    pen.rounded_rectangle((16, 16, 104, 104), 8, fill=(92, 196, 128))
    pen.line((40, 24, 40, 104), fill=(70, 50, 30), width=9)
    pen.polygon([(44, 22), (98, 40), (44, 60)], fill=(255, 214, 48))


def _draw_agent(pen: ImageDraw.ImageDraw, sunk: bool) -> None:
    """A figure in a red coat and a violet hat; in a hole only its upper half is visible."""
    if not sunk:
        pen.ellipse((30, 98, 94, 116), fill=(70, 84, 110))
    shift = 24 if sunk else 0
    pen.rounded_rectangle((34, 58 + shift, 90, 108), 18, fill=(110, 14, 34))
    pen.rounded_rectangle((40, 62 + shift, 84, 102), 14, fill=(226, 42, 62))
    pen.ellipse((36, 20 + shift, 88, 70 + shift), fill=(94, 56, 40))
    pen.ellipse((41, 25 + shift, 83, 66 + shift), fill=(250, 212, 176))
    pen.pieslice((34, 12 + shift, 90, 68 + shift), 180, 360, fill=(110, 40, 160))
    for x in (54, 70):
        pen.ellipse((x - 4, 46 + shift, x + 4, 55 + shift), fill=(30, 20, 20))
    if sunk:
        pen.rectangle((28, 100, 98, 112), fill=(58, 104, 160))
