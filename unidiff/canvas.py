"""Interleaved sequences laid out as a batch for a model.

`Tokens` is a batch of positions, with all that a model's input embedding and attention mask need. `Canvas` is a batch
of interleaved sequences as tokens: the *clean* sequence, and a *noisy* copy of its sampled segments. An estimator
masks tokens of the noisy copy to get their probabilities.

Dimensions: B rows, L columns of the clean sequence, N columns of the noisy copy, n tokens of one segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from unidiff.sequence import Interleaved, Modality, Segment, check_parts
from unidiff.spec import ModelSpec


@dataclass
class Tokens:
    """A batch of positions, all fields [B, N].

    ids: int64. segment: ordinal of the segment in its row, -1 = pad. modality: `Modality`, -1 = pad. position: for
    the rotary embedding. offset: index inside the segment's content, -1 = delimiter or pad. previous: for an image
    token, the id at the same position of the previous image, -1 = none. valid: False = pad.
    """

    ids: Tensor
    segment: Tensor
    modality: Tensor
    position: Tensor
    offset: Tensor
    previous: Tensor
    valid: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.ids.shape

    def map(self, f: Callable[[Tensor], Tensor]) -> Tokens:
        return Tokens(**{x.name: f(getattr(self, x.name)) for x in fields(Tokens)})

    def rows(self, index: Tensor) -> Tokens:
        return self.map(lambda t: t[index])

    def columns(self, keep: Tensor | slice) -> Tokens:
        return self.map(lambda t: t[:, keep])

    def to(self, device: torch.device | str) -> Tokens:
        return self.map(lambda t: t.to(device))

    def with_ids(self, ids: Tensor) -> Tokens:
        return replace(self, ids=ids)

    @staticmethod
    def cat(parts: Sequence[Tokens]) -> Tokens:
        """Joins along columns."""
        return Tokens(**{x.name: torch.cat([getattr(p, x.name) for p in parts], 1) for x in fields(Tokens)})


# A pad's value in each field of Tokens.
_PAD = {"ids": 0, "segment": -1, "modality": -1, "position": 0, "offset": -1, "previous": -1, "valid": 0}


@dataclass
class Canvas:
    """A batch of interleaved sequences laid out for one model.

    clean: the sequence [B, L]. sampled: [B, L] bool, response tokens that the policy sampled (no delimiter, no copied
    image token, nothing after an end token). noisy: [B, N] the copy of the sampled segments that is masked to score
    them: a text with its canvas and the ids after it, an image's sampled tokens. source: [B, N] int64, the column of
    `clean` that a noisy token copies, -1 = the rest of a text's canvas, always masked. step: [B, L] int64, the
    denoising step that committed a sampled token, -1 = not sampled, or unknown.
    """

    clean: Tokens
    sampled: Tensor
    noisy: Tokens
    source: Tensor
    step: Tensor

    @property
    def ids(self) -> Tensor:
        return self.clean.ids

    @property
    def segment(self) -> Tensor:
        return self.clean.segment

    @property
    def modality(self) -> Tensor:
        return self.clean.modality

    @property
    def shape(self) -> torch.Size:
        return self.clean.shape

    def rows(self, index: Tensor) -> Canvas:
        """Some rows. Columns are kept, so that masks drawn for the whole batch still fit."""
        return Canvas(
            self.clean.rows(index),
            self.sampled[index],
            self.noisy.rows(index),
            self.source[index],
            self.step[index],
        )

    def trimmed(self) -> tuple[Canvas, int]:
        """Drops the columns at the right that are pads in every row. Also returns the clean width that remains."""
        width = used_columns(self.clean.valid)
        noisy = used_columns(self.noisy.valid)
        kept = Canvas(
            self.clean.columns(slice(width)),
            self.sampled[:, :width],
            self.noisy.columns(slice(noisy)),
            self.source[:, :noisy],
            self.step[:, :width],
        )
        return kept, width

    def to(self, device: torch.device | str) -> Canvas:
        parts = (self.sampled, self.noisy, self.source, self.step)
        return Canvas(self.clean.to(device), *(part.to(device) for part in parts))  # type: ignore[arg-type]


def used_columns(valid: Tensor) -> int:
    """Columns up to the last one that is valid in some row, at least 1."""
    columns = valid.any(0).nonzero()
    return int(columns.max()) + 1 if len(columns) else 1


def wrap(segment: Segment, spec: ModelSpec, announced: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A segment's ids with the family's delimiters, and their offsets (-1 at delimiters), both [n].

    announced: the text before ended with the delimiter that begins images, so it is not repeated.
    """
    ids = segment.tokens.numpy()
    offset = np.arange(len(ids))
    if segment.modality is Modality.TEXT:
        before, after = spec.before_text if segment.prompt else (), ()
    else:
        before, after = spec.before_image if announced else spec.image_begin, spec.image_end
        if spec.row_separator is not None and segment.grid is not None:
            rows, columns = segment.grid
            at = np.arange(1, rows + 1) * columns
            ids, offset = np.insert(ids, at, spec.row_separator), np.insert(offset, at, -1)
    after = (*after, *segment.behind)
    outside = [-1] * len(before), [-1] * len(after)
    return np.concatenate([before, ids, after]).astype(np.int64), np.concatenate([outside[0], offset, outside[1]])


def _announces(segment: Segment, spec: ModelSpec) -> bool:
    """Whether a segment's last token is the first delimiter of the image that follows."""
    last = int(segment.tokens[-1]) if len(segment) else None
    return segment.modality is Modality.TEXT and last == spec.image_next and spec.image_begin[:1] == (last,)


_NOT_SAMPLED = -2  # a row's step for tokens that were not sampled; `render` turns it into -1


class _Row:
    """Collects the columns of one row, field by field."""

    def __init__(self) -> None:
        self.columns: dict[str, list[np.ndarray]] = {name: [] for name in (*_PAD, "extra")}
        self.length = 0

    def add(self, extra: np.ndarray, **values: np.ndarray | int) -> None:
        n = len(extra)
        for name, value in {**values, "valid": 1, "extra": extra}.items():
            self.columns[name].append(np.broadcast_to(np.asarray(value), (n,)))
        self.length += n

    def joined(self, name: str) -> np.ndarray:
        parts = self.columns[name]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


@dataclass(frozen=True)
class Window:
    """A part of a sequence, for training: the segments to keep, by ordinal, and which of these to score.

    Kept segments have the same ordinals and previous images as in the whole sequence.
    """

    seen: frozenset[int]
    scored: frozenset[int]


def render(
    rows: Sequence[Interleaved],
    spec: ModelSpec,
    device: torch.device | str = "cpu",
    windows: Sequence[Window] | None = None,
) -> Canvas:
    """Lays interleaved sequences out for a model, or a window of each, padded at the right.

    Raises ValueError if an id is outside its modality's range, or a sampled text is longer than the spec's text
    length (see `ModelSpec.check_segment`); TypeError if a row is not a sequence.
    """
    check_parts(rows, "rows", Interleaved)
    clean, noisy = [], []
    for i, row in enumerate(rows):
        a, b = _render_row(row, spec, None if windows is None else windows[i])
        clean.append(a)
        noisy.append(b)
    tokens, commit = _stack(clean, extra_pad=_NOT_SAMPLED)
    copy, source = _stack(noisy, extra_pad=-1)
    return Canvas(tokens, commit > _NOT_SAMPLED, copy, source, commit.clamp(min=-1)).to(device)


def _render_row(row: Interleaved, spec: ModelSpec, window: Window | None = None) -> tuple[_Row, _Row]:
    clean, noisy = _Row(), _Row()
    last_image: Segment | None = None
    for ordinal, segment in enumerate(row):
        spec.check_segment(segment)
        ids, offset = wrap(segment, spec, ordinal > 0 and _announces(row[ordinal - 1], spec))
        inside = offset >= 0
        previous = np.full(len(ids), -1)
        sampled = np.zeros(len(ids), bool)
        sampled[inside] = segment.sampled.numpy()
        if segment.modality is Modality.IMAGE:
            if last_image is not None and last_image.grid == segment.grid:
                previous[inside] = last_image.tokens.masked_fill(last_image.tokens == spec.mask, -1).numpy()
            last_image = segment
        else:
            end = np.isin(ids, spec.text_end)
            sampled &= end.cumsum() - end == 0  # nothing counts after an end token
        if window is not None and ordinal not in window.seen:
            continue
        scored = not segment.prompt and (window is None or ordinal in window.scored)
        sampled &= scored
        start = clean.length
        common = {"segment": ordinal, "modality": int(segment.modality)}
        position = start + np.arange(len(ids))
        step = np.full(len(ids), -1)
        if segment.step is not None:
            step[inside] = segment.step.numpy()
        commit = np.where(sampled, step, _NOT_SAMPLED)
        clean.add(commit, ids=ids, position=position, offset=offset, previous=previous, **common)
        if not scored:
            continue
        at = np.flatnonzero(sampled)
        noisy.add(start + at, ids=ids[at], position=position[at], offset=offset[at], previous=previous[at], **common)
        if segment.modality is Modality.TEXT:
            room, n = spec.room(segment.room), len(segment.behind)
            rest = np.arange(len(at), room)
            noisy.add(np.full(len(rest), -1), ids=spec.mask, position=start + rest, offset=rest, previous=-1, **common)
            if n:  # `behind` follows the whole canvas while the text is sampled
                column, place = start + len(ids) - n + np.arange(n), start + room + np.arange(n)
                noisy.add(column, ids=ids[-n:], position=place, offset=-1, previous=-1, **common)
    return clean, noisy


def _stack(rows: list[_Row], extra_pad: int) -> tuple[Tokens, Tensor]:
    width = max(max((r.length for r in rows), default=0), 1)

    def field(name: str, pad: int) -> Tensor:
        out = np.full((len(rows), width), pad, np.int64)
        for i, row in enumerate(rows):
            out[i, : row.length] = row.joined(name)
        return torch.from_numpy(out)

    values = {name: field(name, pad) for name, pad in _PAD.items()}
    values["valid"] = values["valid"].bool()
    return Tokens(**values), field("extra", extra_pad)
