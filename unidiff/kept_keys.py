"""Approximate key/value caches for sampling from bidirectional models.

Under bidirectional attention every token sees every other, so a token's keys and values are stale as soon as another
token changes. But they change little from step to step. The first step of a text's block or of a picture runs the whole
sequence, and so does every `refresh`-th step after it. The other steps run only some tokens. The active tokens are
those of the text's block, or those of the picture that are denoised.

- "prefix": everything from the first active token to the end (Fast-dLLM, arXiv 2505.22618)
- "dual": the active tokens (Fast-dLLM)
- "delayed": the active tokens that are still masked or were committed in the step before (dKV-Cache, arXiv 2505.15781)

Scoring never uses these caches, so its log-probabilities are exact; the metric `rollout_drift` shows the difference.

Dimensions: B rows, W tokens of a block (a segment after a context, or a whole layout), E active tokens, m that run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from unidiff.sampling.config import SamplerConfig

Kind = Literal["none", "prefix", "dual", "delayed"]


class KeptKeys:
    """The keys and values of one denoising loop, with the interface that transformers' attention layers call.

    columns: int64 [B, m], the block's columns that the step runs; None = the whole sequence. A row that runs fewer
    columns than others repeats its first one. count: int64 [B], the columns that each row runs, without repetitions.
    """

    def __init__(self, kind: Kind, refresh: int | None) -> None:
        self.kind, self.refresh = kind, refresh
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values [B, heads, all, head size]
        self.columns: Tensor | None = None
        self.count: Tensor | None = None
        self._first: Tensor | None = None  # [B, m] index of each column's first occurrence
        self._stored: Tensor | None = None  # [B, m] columns of the whole sequence
        self._rows: Tensor | None = None  # the loop's rows that are still stored
        self._before: Tensor | None = None  # [B, W] ids of the block in the step before

    @classmethod
    def of(cls, config: SamplerConfig) -> KeptKeys | None:
        """None if every step runs everything."""
        if config.approximate_cache == "none" or config.cache_refresh == 1:
            return None
        return cls(config.approximate_cache, config.cache_refresh)

    def choose(
        self, number: int, rows: Tensor, ids: Tensor, mask: int, at: Tensor, work: Tensor | None = None
    ) -> Tensor:
        """Chooses the columns that a step runs. Returns, for each active token, its index [B, E] among the columns
        that run (arbitrary for tokens that do not run).

        number: of the step in its block or picture, from 0. rows: int64 [B], ascending; rows that were dropped do not
        return before the next refresh. ids: [B, W] of the block. mask: id of the mask token. at: int64 [B, E], columns
        of the active tokens. work: bool [B, E], False = padding, where a row has fewer; None = all.
        """
        self.columns = self.count = None
        if number == 0 or (self.refresh is not None and number % self.refresh == 0):
            self._rows, self._before = rows, ids
            return at
        assert self._rows is not None and self._before is not None
        if len(rows) < len(self._rows):
            index = torch.searchsorted(self._rows, rows)
            self._layers = {n: (keys[index], values[index]) for n, (keys, values) in self._layers.items()}
            self._rows, self._before = rows, self._before[index]
        run = self._chosen(ids, mask, at, torch.ones_like(at, dtype=torch.bool) if work is None else work)
        self._before, self.count = ids, run.sum(1)
        order = run.int().argsort(dim=1, descending=True, stable=True)[:, : int(self.count.max())]
        self.columns = torch.where(run.gather(1, order), order, order[:, :1])
        number_of = torch.arange(order.shape[1], device=ids.device).expand_as(order)
        place = torch.zeros_like(ids).scatter_reduce(1, self.columns, number_of, "amin", include_self=False)
        self._first = place.gather(1, self.columns)
        return place.gather(1, at)

    def _chosen(self, ids: Tensor, mask: int, at: Tensor, work: Tensor) -> Tensor:
        """[B, W] bool: the columns of the block that run."""
        at_work = torch.zeros_like(ids).scatter_reduce(1, at, work.long(), "amax").bool()
        if self.kind == "prefix":
            return at_work.cumsum(1) > 0
        if self.kind == "dual":
            return at_work
        assert self._before is not None
        return at_work & ((ids == mask) | (ids != self._before))

    def run(self, start: int = 0) -> Tensor | None:
        """The columns [B, m] to run in a sequence whose block begins at `start`; None = the whole sequence."""
        self._stored = None if self.columns is None else self.columns + start
        return self._stored

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Stores new keys and values of a layer and returns all of them. keys, values: [B, heads, m or all, head size],
        of the columns that ran."""
        if self._stored is None:
            self._layers[layer] = keys, values
        else:
            assert self._first is not None
            for kept, new in zip(self._layers[layer], (keys, values)):
                # A repeated column is written twice, with the same values.
                place, first = (x[:, None, :, None].expand_as(new) for x in (self._stored, self._first))
                kept.scatter_(2, place, new.gather(2, first))
        return self._layers[layer]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0
