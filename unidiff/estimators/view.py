"""Data of estimators: views (token masks), and the places of tokens in their segments.

Dimensions: B rows, L columns of `Canvas.clean`, K views.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.canvas import Canvas


@dataclass
class View:
    """One token mask, and which of the masked tokens are scored. All fields [B, L].

    mask: bool, the sampled tokens to mask. hide: bool, prompt tokens to mask as well; they are never scored. None = the
    prompt is visible. factor: bool or float, the weight of a masked token's log-probability; 0 = not scored; None = 1
    for every masked token. It is ignored where `mask` is False.
    """

    mask: Tensor
    hide: Tensor | None = None
    factor: Tensor | None = None

    @property
    def factors(self) -> Tensor:
        """`factor`, or `mask` where none is given."""
        return self.mask if self.factor is None else self.factor

    @property
    def scored(self) -> Tensor:
        """bool: the masked tokens whose factor is not 0."""
        return self.mask & (self.factors != 0)

    def rows(self, index: Tensor) -> View:
        return View(*(None if x is None else x[index] for x in (self.mask, self.hide, self.factor)))  # type: ignore[arg-type]


@dataclass
class Draw:
    """The views of one inner iteration, and each token's weight in the loss, float32 [B, L].

    A token has weight only if a view scores it. counts: how many of the first views the text and the image estimator
    use.
    """

    views: list[View]
    weight: Tensor
    counts: tuple[int, int]

    @property
    def mask(self) -> Tensor:
        """[B, L] bool: tokens that some view masks and scores."""
        return torch.stack([view.scored for view in self.views]).any(0)

    def only(self, keep: Tensor) -> Draw:
        """The same masks, with nothing scored outside of `keep` [B, L] bool."""
        views = [View(view.mask, view.hide, view.factors * keep) for view in self.views]
        return Draw(views, self.weight * keep, self.counts)

    def rows(self, index: Tensor) -> Draw:
        """Selects rows; keeps views that score nothing in them."""
        return Draw([view.rows(index) for view in self.views], self.weight[index], self.counts)


@dataclass
class Place:
    """The place of each sampled token among the sampled tokens of its segment. All fields [B, L] int64.

    rank: 0 … length-1; meaningless where a column is not sampled. length: number of sampled tokens in the column's
    segment. run: index of the column's segment in its row, which groups columns by segment.
    """

    rank: Tensor
    length: Tensor
    run: Tensor

    @classmethod
    def of(cls, canvas: Canvas) -> Place:
        """The places in a canvas. A segment is one run of columns."""
        segment, sampled = canvas.segment, canvas.sampled.long()
        starts = torch.zeros_like(sampled)
        starts[:, 1:] = (segment[:, 1:] != segment[:, :-1]).long()
        run = starts.cumsum(1)
        count = torch.zeros_like(sampled).scatter_add_(1, run, sampled)
        earlier = count.cumsum(1) - count
        return cls(sampled.cumsum(1) - 1 - earlier.gather(1, run), count.gather(1, run), run)

    def total(self, values: Tensor) -> Tensor:
        """Sums [B, L] values over each segment, and copies the sum to all of its columns. Differentiable."""
        return torch.zeros_like(values).scatter_add(1, self.run, values).gather(1, self.run)

    def order(self, values: Tensor, among: Tensor) -> Tensor:
        """[B, L] int64: rank of each chosen token in its segment by ascending value, from 0; ties from left to right.

        values: [B, L] float. among: [B, L] bool, the chosen tokens; the result is undefined at the others.
        """
        by_value = values.masked_fill(~among, torch.inf).argsort(dim=1, stable=True)
        by_run = by_value.gather(1, self.run.gather(1, by_value).argsort(dim=1, stable=True))
        column = torch.arange(values.shape[1], device=values.device).expand_as(self.run)
        place = torch.empty_like(self.run).scatter_(1, by_run, column)
        # Sorting keeps a segment's columns together, so its first column stays the same.
        first = torch.full_like(self.run, values.shape[1]).scatter_reduce_(1, self.run, column, "amin")
        return place - first.gather(1, self.run)
