"""What estimators deal in: views (what is masked at a time), places of tokens in their segments, and noise.

Dimensions: B rows, L columns of `Canvas.clean`, K views.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff import noise
from unidiff.sequence import Canvas

# First number of every noise stream drawn here, so that no sampler shares one ("view" in ASCII).
_STREAM = 0x76696577
_SEGMENT_STRIDE = 1 << 32  # noise counter of a token = segment · stride + offset: larger than any segment


@dataclass
class View:
    """One way to ask: what is masked, and what of it is scored. All fields [B, L].

    mask: bool, sampled tokens that are masked. hide: bool, prompt tokens that are masked too, and never scored; None =
    the prompt stands as it is. factor: bool or float, what the log-probability of a masked token counts for, 0 = it
    is not scored; None = every masked token counts 1. (Where nothing is masked it has no say.)
    """

    mask: Tensor
    hide: Tensor | None = None
    factor: Tensor | None = None

    @property
    def factors(self) -> Tensor:
        """`factor`, also where it is not given."""
        return self.mask if self.factor is None else self.factor

    @property
    def scored(self) -> Tensor:
        """bool: the masked tokens that count."""
        return self.mask & (self.factors != 0)

    def rows(self, index: Tensor) -> View:
        return View(*(None if x is None else x[index] for x in (self.mask, self.hide, self.factor)))  # type: ignore[arg-type]


@dataclass
class Draw:
    """All that one inner iteration scores: its views, and the weight of each token in the loss, float32 [B, L].

    A token has weight only if a view scores it. counts: how many views the text estimator asked for, and the image
    estimator: the first so many are its own.
    """

    views: list[View]
    weight: Tensor
    counts: tuple[int, int]

    @property
    def mask(self) -> Tensor:
        """[B, L] bool: tokens that some view masks and scores."""
        return torch.stack([view.scored for view in self.views]).any(0)

    def rows(self, index: Tensor) -> Draw:
        """Some rows; views that score nothing in them stay."""
        return Draw([view.rows(index) for view in self.views], self.weight[index], self.counts)


@dataclass
class Place:
    """Where a sampled token stands among the sampled tokens of its segment; all fields [B, L] int64.

    rank: 0 … length-1 (of no meaning where not sampled). length: number of sampled tokens in the segment of
    this column. run: index of this column's segment among the runs of columns in its row, to group columns by
    segment.
    """

    rank: Tensor
    length: Tensor
    run: Tensor

    @classmethod
    def of(cls, canvas: Canvas) -> Place:
        """Reads the places off a canvas, in which a segment is one run of columns."""
        segment, sampled = canvas.segment, canvas.sampled.long()
        starts = torch.zeros_like(sampled)
        starts[:, 1:] = (segment[:, 1:] != segment[:, :-1]).long()
        run = starts.cumsum(1)
        count = torch.zeros_like(sampled).scatter_add_(1, run, sampled)
        earlier = count.cumsum(1) - count
        return cls(sampled.cumsum(1) - 1 - earlier.gather(1, run), count.gather(1, run), run)

    def total(self, values: Tensor) -> Tensor:
        """Sum of [B, L] numbers over each column's segment, at every column of it. Differentiable."""
        return torch.zeros_like(values).scatter_add(1, self.run, values).gather(1, self.run)

    def order(self, values: Tensor, among: Tensor) -> Tensor:
        """[B, L] int64: how many of the chosen tokens of its segment have a smaller value; ties from left to right.

        values: [B, L] float. among: [B, L] bool, the chosen tokens; the result means nothing at the others.
        """
        by_value = values.masked_fill(~among, torch.inf).argsort(dim=1, stable=True)
        by_run = by_value.gather(1, self.run.gather(1, by_value).argsort(dim=1, stable=True))
        column = torch.arange(values.shape[1], device=values.device).expand_as(self.run)
        place = torch.empty_like(self.run).scatter_(1, by_run, column)
        # Sorted or not, a segment's columns begin where they began.
        first = torch.full_like(self.run, values.shape[1]).scatter_reduce_(1, self.run, column, "amin")
        return place - first.gather(1, self.run)


def token_uniform(canvas: Canvas, keys_B: Tensor, *stream: int) -> Tensor:
    """[B, L] float64 in (0, 1): a number for each content token.

    A function of the row's key, the stream, the token's segment and its offset in it: so not of its column,
    the padding or the batch.
    """
    counter = canvas.segment * _SEGMENT_STRIDE + canvas.clean.offset
    return noise.uniform(keys_B.to(counter.device), (_STREAM, *stream), counter)


def segment_uniform(canvas: Canvas, keys_B: Tensor, *stream: int) -> Tensor:
    """[B, L] float64 in (0, 1): a number for each segment, the same at all of its columns. See `token_uniform`."""
    counter = canvas.segment * _SEGMENT_STRIDE + (_SEGMENT_STRIDE - 1)  # no token's
    return noise.uniform(keys_B.to(counter.device), (_STREAM, *stream), counter)
