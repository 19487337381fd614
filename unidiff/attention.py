"""Attention masks, and the exact key/value cache of block-causal models.

Under block-causal attention a token sees every earlier segment and all of its own segment. A finished segment's keys
and values then never change, so caching them is exact. Under bidirectional attention every token sees every other. A
segment is then scored with the sequence cut to what existed when it was sampled. Masks are additive: 0 where a key is
visible, a large negative number elsewhere (not -inf: softmax of a pad's row of -inf would be NaN).
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unidiff.canvas import Canvas, Tokens, used_columns
from unidiff.sequence import Modality
from unidiff.spec import PAD_POLICIES

if TYPE_CHECKING:
    from unidiff.kept_keys import KeptKeys


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, Q, K] bool -> [B, 1, Q, K] additive mask."""
    hidden = torch.finfo(dtype).min / 2
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, hidden)[:, None]


def pad_bias(valid: Tensor | None, policy: str, additive_to: str, dtype: torch.dtype) -> Tensor | None:
    """Additive mask [B, 1, 1 or L, L] for rows with pads; valid [B, L]: False or 0 = pad.

    policy: "hard" = pads are never attended. "attend" = pads are like other tokens; returns None, as without `valid`.
    "additive_one" = pads are attended, but 1 is added to the scores of valid tokens: where query and key are both valid
    (additive_to="valid_pairs"), or where the key is ("valid_keys").
    """
    if valid is None or policy == "attend":
        return None
    valid = valid.bool()
    if policy == "hard":
        return additive(valid[:, None, :], dtype)
    if policy != "additive_one":
        raise ValueError(f"pad_policy is {policy!r}; choose one of {', '.join(PAD_POLICIES)}")
    keys = valid[:, None, None, :]
    return (keys & valid[:, None, :, None] if additive_to == "valid_pairs" else keys).to(dtype)


def seen_block_causal(query: Tokens, key: Tokens) -> Tensor:
    """[B, Q, K] bool: a token sees valid tokens of its own and of earlier segments."""
    return (key.segment[:, None, :] <= query.segment[:, :, None]) & key.valid[:, None, :]


def seen_clean_and_noisy(clean: Tokens, noisy: Tokens, copy: Tensor) -> Tensor:
    """[B, L+M, L+M] bool for the clean sequence [B, L] followed by noisy copies of its segments [B, M].

    Clean tokens see clean tokens block-causally. A noisy token sees the clean tokens of earlier segments and the noisy
    tokens of its own segment and copy: the same context as in sampling. copy: [B, M], the index of a token's copy.
    """
    L = clean.shape[1]
    width = L + noisy.shape[1]
    seen = clean.valid.new_zeros(clean.shape[0], width, width)
    seen[:, :L, :L] = seen_block_causal(clean, clean)
    segment = noisy.segment[:, :, None]
    seen[:, L:, :L] = (clean.segment[:, None, :] < segment) & clean.valid[:, None, :]
    together = (noisy.segment[:, None, :] == segment) & (copy[:, None, :] == copy[:, :, None])
    seen[:, L:, L:] = together & noisy.valid[:, None, :]
    return seen


def noisy_copies(
    canvas: Canvas, mask_KBL: Tensor, scored_KBL: Tensor, hide: int
) -> tuple[Tokens, Tensor, Tensor, Tensor]:
    """The noisy copies after a block-causal model's clean sequence. Each of K masks gets copies of only the segments in
    which it scores a token.

    canvas: [B, L]. mask_KBL: bool, the tokens to mask. scored_KBL: bool, the masked tokens to score. hide: id of the
    mask token. Returns tokens [B, M], padded at the right; source [B, M], the column of `clean` that each copies (-1 =
    none); copy [B, M], the index of its mask; scored [B, M] bool. M is at least 1.
    """
    K, N = len(mask_KBL), canvas.noisy.shape[1]
    noisy = Tokens.cat([canvas.noisy] * K)
    source = canvas.source.repeat(1, K)
    copy = torch.arange(K, device=source.device).repeat_interleave(N).expand_as(source)
    touched = touched_segments(canvas, scored_KBL).transpose(0, 1)  # [B, K, S]
    keep = noisy.valid & touched.flatten(1).gather(1, copy * touched.shape[2] + noisy.segment.clamp(min=0))

    def of_source(x_KBL: Tensor) -> Tensor:
        return x_KBL.transpose(0, 1).flatten(1).gather(1, copy * mask_KBL.shape[2] + source.clamp(min=0))

    masked = (source < 0) | of_source(mask_KBL)
    scored = keep & (source >= 0) & of_source(scored_KBL)
    tokens = noisy.with_ids(noisy.ids.masked_fill(masked, hide))
    tokens.valid = keep
    packed = _to_the_left(keep)
    return tokens.map(packed), packed(source), packed(copy), packed(scored)


def before_last_sampled(canvas: Canvas) -> Tokens:
    """The clean tokens that some noisy token of their row sees: those before the last segment with a sampled token.
    No other clean token is needed. The cut does not depend on the masks, so results are bit-identical for any
    number of masks."""
    ordinal = (canvas.segment * canvas.sampled).amax(1, keepdim=True)  # 0 where nothing is sampled
    seen = canvas.clean.valid & (canvas.segment < ordinal)
    return dataclasses.replace(canvas.clean, valid=seen).columns(slice(used_columns(seen)))


def touched_segments(canvas: Canvas, scored_KBL: Tensor) -> Tensor:
    """[K, B, S] bool: whether mask k scores a token of segment s."""
    touched = canvas.segment.new_zeros(*scored_KBL.shape[:2], int(canvas.segment.max()) + 2)
    touched.scatter_(2, (canvas.segment + 1) * scored_KBL, 1)  # unscored tokens write to column 0, which is dropped
    return touched[:, :, 1:].bool()


def _to_the_left(keep: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns a function that moves the columns selected by `keep` [B, W] to the left of a [B, W] tensor, in order."""
    order = keep.int().argsort(dim=1, descending=True, stable=True)[:, : max(int(keep.sum(1).max()), 1)]
    return lambda x: x.gather(1, order)


def cut_after_segments(
    canvas: Canvas, mask_KBL: Tensor, scored_KBL: Tensor, hide: int
) -> tuple[Tokens, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The inputs that a bidirectional model saw when it sampled: for each of K masks, one row per segment in which the
    mask scores a token.

    canvas: [B, L], with a noisy copy [B, N]. mask_KBL: bool, the tokens to mask. scored_KBL: bool, the masked tokens to
    score. hide: id of the mask token. A row is the clean sequence before the segment, then the segment with its masked
    tokens: an image with its delimiters and copied tokens, a text with its whole canvas. Later segments did not exist
    yet, so they are left out.

    Returns tokens [R, W], padded at the right; source [R, W], the column of `clean` of each token (-1 = none); scored
    [R, W] bool; and the mask and the canvas row of each of the R rows, both [R]. R is at least 1.
    """
    touched = touched_segments(canvas, scored_KBL)
    if not bool(touched.any()):
        touched[0, 0, 0] = True
    which, owner, ordinal = touched.nonzero(as_tuple=True)
    both = Tokens.cat([canvas.clean, canvas.noisy]).rows(owner)
    width = canvas.shape[1]
    source = torch.cat([torch.arange(width, device=owner.device).expand(canvas.shape), canvas.source], 1)[owner]
    copy = torch.zeros_like(source, dtype=torch.bool)
    copy[:, width:] = True
    here = both.segment == ordinal[:, None]
    image = both.modality == Modality.IMAGE
    keep = both.valid & torch.where(copy, here & ~image, (both.segment < ordinal[:, None]) | (here & image))
    own, inside = keep & here & (source >= 0), source.clamp(min=0)
    hidden = (own & mask_KBL[which, owner].gather(1, inside)) | (keep & (source < 0))
    scored = own & scored_KBL[which, owner].gather(1, inside)
    tokens = both.with_ids(both.ids.masked_fill(hidden, hide))
    tokens.valid = keep
    packed = _to_the_left(keep)
    return tokens.map(packed), packed(source), packed(scored), (which, owner)


def like_lengths(lengths: Sequence[int], most: int = 4) -> list[list[int]]:
    """Groups rows of similar length, in at most `most` groups. Each group is padded to its longest row, and the groups
    minimise the total of tokens. One more group must save 5 % of them."""
    held = Counter(lengths)
    values = sorted(held)
    upto = list(itertools.accumulate(held[v] for v in values))
    # least[j]: the fewest tokens for the rows of the first j + 1 lengths, and where the groups end
    least = [(upto[j] * v, (j,)) for j, v in enumerate(values)]
    for _ in range(most - 1):
        more = [
            min([least[j], *((least[i][0] + (upto[j] - upto[i]) * v, (*least[i][1], j)) for i in range(j))])
            for j, v in enumerate(values)
        ]
        if more[-1][0] > 0.95 * least[-1][0]:
            break
        least = more
    ends = [values[j] for j in least[-1][1]]
    groups: list[list[int]] = [[] for _ in ends]
    for row, length in enumerate(lengths):
        groups[bisect.bisect_left(ends, length)].append(row)
    return groups


class SegmentCache:
    """Keys and values of finished segments, with the interface that transformers' attention layers call.

    A forward pass over a new block calls `update` once per layer. It appends the block's keys and values, so that the
    block sees them and the finished ones. They stay only if `advance` is called; otherwise the next block overwrites
    them. Storage is [B, heads, capacity, head_dim] per layer, allocated once.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * layers  # keys and values; None = none yet
        self.capacity = capacity
        self.length = 0

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        store = self.layers[layer]
        if store is None:
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            store = self.layers[layer] = (keys.new_zeros(shape), keys.new_zeros(shape))
        rows, end = keys.shape[0], self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"SegmentCache holds {self.capacity} tokens, and {end} are needed")
        for kept, new in zip(store, (keys, values)):
            kept[:rows, :, self.length : end] = new
        return store[0][:rows, :, :end], store[1][:rows, :, :end]

    def advance(self, n: int) -> None:
        self.length += n

    def rows(self, index: Tensor) -> None:
        """Selects rows; an index may repeat."""
        self.layers = [None if layer is None else (layer[0][index], layer[1][index]) for layer in self.layers]

    def only(self, index: Tensor) -> SegmentCache:
        """A copy of some rows."""
        other = copy.copy(self)
        other.rows(index)
        return other

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


class Context:
    """The finished part of a batch of sequences during sampling.

    Block-causal: an exact cache, or none (`cache=False`: every read runs the whole sequence again; tests compare the
    cached path with it). Bidirectional: every read runs the whole sequence; or only the columns that the reader asks
    for, if it keeps keys and values of the others (`unidiff.kept_keys`).
    """

    def __init__(self, layers: int, capacity: int, cache: bool = True, bidirectional: bool = False) -> None:
        self.tokens: Tokens | None = None
        self.bidirectional = bidirectional
        self.cache = SegmentCache(layers, capacity) if cache and not bidirectional else None
        self._full = True  # no pads anywhere
        self._fewer: tuple[Tensor, Context] | None = None  # the rows of the last call of `only`, and their context

    def inputs(self, block: Tokens, dtype: torch.dtype, kept: KeptKeys | None = None) -> tuple[Tokens, Tensor | None]:
        """The tokens to run to read `block`, and their additive mask (None = full attention). The tokens end with the
        block, or are the columns that `kept` asks for. `block` may have fewer rows: the context's first ones."""
        before = None if self.tokens is None else self.tokens.map(lambda t: t[: block.shape[0]])
        everything = block if before is None else Tokens.cat([before, block])
        if not self.bidirectional:
            query = everything if self.cache is None else block
            return query, additive(seen_block_causal(query, everything), dtype)
        query = everything
        if kept is not None and (columns := kept.run(everything.shape[1] - block.shape[1])) is not None:
            query = everything.map(lambda t: t.gather(1, columns))
        seen = everything.valid[:, None].expand(-1, query.shape[1], -1)
        return query, None if self._full and kept is None else additive(seen, dtype)

    def only(self, rows: Tensor, among: int, first: bool, again: int = 1) -> Context:
        """This context, restricted to the rows that a denoising loop has not finished; for reading only.

        rows: int64, ascending, among the context's first `among` rows. first: a new loop begins; each later call's
        rows are a subset of the call before. again: each row is repeated this many times in a row. Keys and values are
        copied only when rows have been dropped, or are repeated.
        """
        if first:
            self._fewer = None
        held, context = self._fewer or (torch.arange(among, device=rows.device), self)
        if again > 1:
            each = self.only(rows[::again].contiguous(), among, first)
            return each._copy(torch.arange(len(rows), device=rows.device) // again)
        if len(rows) < len(held):
            context = context._copy(torch.searchsorted(held, rows))
            self._fewer = rows, context
        return context

    def _copy(self, index: Tensor) -> Context:
        other = copy.copy(self)
        other.tokens = None if self.tokens is None else self.tokens.rows(index)
        other.cache = None if self.cache is None else self.cache.only(index)
        return other

    def append(self, block: Tokens) -> None:
        """Appends `block`. It must just have been read in its final state."""
        self.tokens = block if self.tokens is None else Tokens.cat([self.tokens, block])
        if self.cache is not None:
            self.cache.advance(block.shape[1])
        self._look()

    def rows(self, index: Tensor) -> None:
        if self.tokens is not None:
            self.tokens = self.tokens.rows(index)
        if self.cache is not None:
            self.cache.rows(index)
        self._look()

    def _look(self) -> None:
        self._fewer = None
        if self.bidirectional:  # once per segment: `all` synchronises with the device
            self._full = self.tokens is None or bool(self.tokens.valid.all())

    @property
    def lengths(self) -> Tensor:
        """[B] number of valid tokens in each row."""
        assert self.tokens is not None
        return self.tokens.valid.sum(1)
