"""Image rewards: agreement with a target picture, and locality of edits.

A column holds the target: a PIL image or uint8 [H, W, 3] for all pictures of the row, or a list with one target per
round; None = no target. Further options (`weight`, `name`, …) are those of `reward`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d

from unidiff.config import typed
from unidiff.images.picture import rgb
from unidiff.rewards.guard import Value, column_of, each
from unidiff.rewards.names import register
from unidiff.rewards.reward import Reward, reward
from unidiff.rewards.segment_view import SegmentView
from unidiff.scorers.text import check_tolerance

PSNR_TOP = 50.0  # dB; equal pictures would have infinity
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # of Wang et al. 2004


def pixels_of(picture: Image.Image | np.ndarray) -> np.ndarray:
    """A picture as uint8 [H, W, 3]. Raises ValueError for an array of another shape or dtype, TypeError for other
    types."""
    if isinstance(picture, Image.Image):
        return np.asarray(rgb(picture))
    if not isinstance(picture, np.ndarray):
        raise TypeError(f"a picture is a PIL image or uint8 [H, W, 3], not a {type(picture).__name__}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a picture is uint8 [H, W, 3], not {picture.dtype} {list(picture.shape)}")
    return picture


def close_pixels(a: np.ndarray, b: np.ndarray, tolerance: int) -> np.ndarray:
    """bool [H, W]: no channel differs by more than `tolerance` of 255."""
    return np.abs(a.astype(np.int16) - b.astype(np.int16)).max(-1) <= tolerance


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 [H, W, 3]: 10 log10(255² / mean square error) dB, at most `PSNR_TOP`."""
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean()
    return float(min(10 * np.log10(255**2 / max(error, 1e-12)), PSNR_TOP))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two uint8 [H, W, 3] in [−1, 1], the mean over channels and windows.

    Wang, Bovik, Sheikh, Simoncelli 2004, equation 13: Gaussian windows of 11 × 11 pixels, σ = 1.5, K₁ = 0.01,
    K₂ = 0.03; smaller windows in pictures that have fewer pixels.
    """
    size = min(SSIM_WINDOW, *(side - (side + 1) % 2 for side in a.shape[:2]))
    offset = torch.arange(size, dtype=torch.float64) - size // 2
    line = torch.exp(-(offset**2) / (2 * SSIM_SIGMA**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    x, y = (torch.from_numpy(p.astype(np.float64) / 255).permute(2, 0, 1)[:, None] for p in (a, b))

    def mean(values: Tensor) -> Tensor:
        return conv2d(values, window)

    mx, my = mean(x), mean(y)
    vx, vy, covariance = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mx * my + c1) * (2 * covariance + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return similar.mean().item()


# --- agreement with a target ------------------------------------------------------------------------------------------


def _target(view: SegmentView, column: str) -> Any:
    """The target of one picture; None if it has none."""
    target = column_of(view, column)
    if isinstance(target, list | tuple):
        return target[view.round] if view.round < len(target) else None
    return target


def _agreement(
    compare: Callable[[np.ndarray, np.ndarray], float], column: str, name: str, options: dict[str, Any]
) -> Reward:
    """A reward that compares picture and target, both uint8 [H, W, 3]. If their sizes differ, the value is missing."""

    def judge(view: SegmentView) -> float | None:
        target = _target(view, column)
        if target is None:
            return None
        a, b = pixels_of(view.pixels), pixels_of(target)  # type: ignore[arg-type]
        if a.shape != b.shape:
            sizes = " and ".join(f"{p.shape[1]} × {p.shape[0]}" for p in (a, b))
            raise ValueError(f"picture and target differ in size: {sizes}")
        return compare(a, b)

    return _image_reward(judge, column, {"name": name, **options})


def _image_reward(judge: Callable[[SegmentView], Value], column: str | None, options: dict[str, Any]) -> Reward:
    """A reward from a judge of one picture. column: the column that the judge reads, if any."""

    def judge_pictures(segments: Sequence[SegmentView]) -> list[Value]:
        return each(segments, judge, column)

    return reward(judge_pictures, on="image", **options)


@typed
def pixel_agreement(column: str = "target", *, tolerance: int = 0, **options: Any) -> Reward:
    """Share of pixels that equal the target's, up to `tolerance` of 255 in each channel."""
    check_tolerance(tolerance, 255)
    return _agreement(lambda a, b: float(close_pixels(a, b, tolerance).mean()), column, "pixel_agreement", options)


@typed
def cell_agreement(rows: int, columns: int, column: str = "target", *, tolerance: int = 16, **options: Any) -> Reward:
    """Share of the cells of a rows × columns board whose mean colour equals the target's, up to `tolerance` of 255.

    If the board does not divide the picture's pixels evenly, the value is missing.
    """
    check_tolerance(tolerance, 255)
    if rows < 1 or columns < 1:
        raise ValueError(f"a board of {rows} × {columns} cells; both must be 1 or more")

    def compare(a: np.ndarray, b: np.ndarray) -> float:
        height, width = a.shape[:2]
        if height % rows or width % columns:
            raise ValueError(f"{rows} × {columns} cells do not divide a picture of {height} × {width} pixels")
        cells = (p.reshape(rows, height // rows, columns, width // columns, 3).mean((1, 3)) for p in (a, b))
        first, second = cells
        return float((np.abs(first - second) <= tolerance).all(-1).mean())

    return _agreement(compare, column, "cell_agreement", options)


@typed
def psnr_agreement(column: str = "target", **options: Any) -> Reward:
    """Peak signal-to-noise ratio against the target, as a share of 50 dB: 1 for equal pictures."""
    return _agreement(lambda a, b: psnr(a, b) / PSNR_TOP, column, "psnr_agreement", options)


@typed
def ssim_agreement(column: str = "target", **options: Any) -> Reward:
    """Structural similarity with the target."""
    return _agreement(ssim, column, "ssim_agreement", options)


@typed
def token_agreement(column: str = "target_tokens", **options: Any) -> Reward:
    """Share of tokens that equal the target's. The target is ids in the model's vocabulary, [n] for all pictures of the
    row, or a list with one target per round. If the numbers of tokens differ, the value is missing."""

    def compare(view: SegmentView) -> float | None:
        target = column_of(view, column)
        if isinstance(target, list | tuple) and not (target and isinstance(target[0], Real)):
            target = _target(view, column)
        if target is None:
            return None
        wanted = torch.as_tensor(target, device=view.tokens.device)
        if wanted.shape != view.tokens.shape:
            raise ValueError(f"a picture of {len(view.tokens)} tokens has a target of shape {list(wanted.shape)}")
        if wanted.dtype == torch.bool or wanted.is_floating_point() or (wanted < 0).any():
            raise ValueError("the target's tokens must be ids: whole numbers from 0 up")
        return (wanted == view.tokens).double().mean().item()

    return _image_reward(compare, column, {"name": "token_agreement", **options})


# --- edits ------------------------------------------------------------------------------------------------------------


def enlarged(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Enlarges a mask [h, w] to bool [height, width] by nearest neighbour. Raises ValueError for a mask of another
    shape, or of a dtype other than bool or integer."""
    if mask.ndim != 2 or not mask.size or mask.dtype.kind not in "bui":
        raise ValueError(f"a mask is bool [h, w], not {mask.dtype} {list(mask.shape)}")
    rows = np.arange(height) * mask.shape[0] // height
    columns = np.arange(width) * mask.shape[1] // width
    return np.asarray(mask, bool)[rows][:, columns]


@typed
def edit_locality(column: str | None = None, *, tolerance: int = 8, **options: Any) -> Reward:
    """Share of unchanged pixels outside the edit; 0 if no pixel inside the edit has changed.

    column: bool [h, w], the mask of the wanted edit, in any resolution; or a list with one mask per round. Without a
    column, the mask is the tokens that were denoised again; then the reward measures how well the image tokenizer keeps
    an edit local. tolerance: of 255; smaller or equal changes do not count. Not applicable without a previous picture
    or a mask. If the picture's size differs from the previous one's, the value is missing.
    """
    check_tolerance(tolerance, 255)

    def judge(view: SegmentView) -> float | None:
        mask = view.edited if column is None else _target(view, column)
        if mask is None or view.image_before is None:
            return None
        after, before = pixels_of(view.pixels), pixels_of(view.image_before)  # type: ignore[arg-type]
        if after.shape != before.shape:
            raise ValueError(f"a picture of shape {after.shape} follows one of shape {before.shape}")
        inside = enlarged(np.asarray(mask), *after.shape[:2])
        same = close_pixels(after, before, tolerance)
        if inside.any() and same[inside].all():
            return 0.0
        return 1.0 if inside.all() else float(same[~inside].mean())

    return _image_reward(judge, column, {"name": "edit_locality", **options})


for _name, _reward in {
    "pixel_agreement": pixel_agreement(),
    "psnr_agreement": psnr_agreement(),
    "ssim_agreement": ssim_agreement(),
    "token_agreement": token_agreement(),
    "edit_locality": edit_locality(),
}.items():
    register(_name)(_reward)
