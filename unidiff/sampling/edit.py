"""Edit selectors: which tokens of the copied image are denoised again.

A selector never sees privileged state. `region` reads what the model itself has just written, or a box that a user
gives; `confidence` asks the model which tokens of the copy it finds least likely in the new context; `random` and
`full` (regenerate all of it) are the baselines.
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
    """[B, n] bool: the tokens that each row's text names, found by the row's own function. Nothing named: nothing is
    edited. Raises ValueError for a region of another shape."""
    masks = []
    for text, find in zip(texts, locate):
        found = find(text, grid)
        masks.append(np.zeros(grid, bool) if found is None else np.asarray(found, bool))
        if masks[-1].shape != grid:
            raise ValueError(f"the region of {text!r} is {masks[-1].shape}, the image's grid {grid}")
    return torch.from_numpy(np.stack(masks)).flatten(1).to(device)


def box(top: int, left: int, bottom: int, right: int) -> Locate:
    """A user's box in token rows and columns, half-open, whatever the text says. Raises ValueError if it is empty."""
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
    """A user's tokens [rows, columns] bool, whatever the text says: from pixels by `unidiff.images.grid`."""
    return lambda _text, _grid: mask


def lowest(score_Bn: Tensor, share: float, threshold: float | None = None) -> Tensor:
    """[B, n] bool: tokens whose score is below the threshold, or without one the lowest `share` (at least one; the
    first of equal ones)."""
    if threshold is not None:
        return score_Bn < threshold
    count = max(1, round(share * score_Bn.shape[1]))
    lowest_first = score_Bn.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(score_Bn, dtype=torch.bool).scatter(1, lowest_first, True)


def random(keys_B: Tensor, n: int, share: float, stream: tuple[int, ...]) -> Tensor:
    """[B, n] bool: a random share of the tokens."""
    return lowest(noise.uniform(keys_B, stream, n), share)
