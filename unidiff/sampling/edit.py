"""Edit selectors: which tokens of the copied image are denoised again.

A selector never sees the task's hidden state. `region` uses the region that the model's last text names, or a user's
box. `confidence` takes the tokens of the copy that the model finds least likely in the new context. `random` and `full`
(regenerate everything) are baselines.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unidiff import noise
from unidiff.sequence import Locate

EDITS = ("region", "confidence", "random", "full")


def region(texts: Sequence[str], grid: tuple[int, int], locate: Sequence[Locate], device: torch.device | str) -> Tensor:
    """[B, n] bool: the tokens that each row's text names, found by the row's own function; none if it names no region.
    Raises ValueError for a region of another shape."""
    masks = []
    for text, find in zip(texts, locate):
        found = find(text, grid)
        masks.append(np.zeros(grid, bool) if found is None else np.asarray(found, bool))
        if masks[-1].shape != grid:
            raise ValueError(f"the region of {text!r} is {masks[-1].shape}, the image's grid {grid}")
    return torch.from_numpy(np.stack(masks)).flatten(1).to(device)


def box(top: int, left: int, bottom: int, right: int) -> Locate:
    """A fixed box in token rows and columns, half-open, for any text. Raises ValueError if it is empty."""
    if not (0 <= top < bottom and 0 <= left < right):
        raise ValueError(f"box {top, left, bottom, right}: needs 0 <= top < bottom and 0 <= left < right")

    def locate(_: str, grid: tuple[int, int]) -> np.ndarray:
        if bottom > grid[0] or right > grid[1]:
            raise ValueError(f"box {top, left, bottom, right} does not fit a grid of {grid}")
        mask = np.zeros(grid, bool)
        mask[top:bottom, left:right] = True
        return mask

    return locate


def given(mask: np.ndarray | Tensor) -> Locate:
    """A fixed token mask [rows, columns] bool, for any text. `unidiff.images.grid` makes one from pixels."""
    return lambda _text, _grid: mask


def lowest(score_Bn: Tensor, share: float, threshold: float | None = None) -> Tensor:
    """[B, n] bool: tokens with a score below the threshold; without a threshold, the `share` of tokens with the lowest
    scores (at least one; ties from left to right)."""
    if threshold is not None:
        return score_Bn < threshold
    count = max(1, round(share * score_Bn.shape[1]))
    lowest_first = score_Bn.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(score_Bn, dtype=torch.bool).scatter(1, lowest_first, True)


def random(keys_B: Tensor, n: int, share: float, stream: tuple[int, ...]) -> Tensor:
    """[B, n] bool: a random share of the tokens."""
    return lowest(noise.uniform(keys_B, stream, n), share)
