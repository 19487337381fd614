"""The input of a reward function: one sampled segment (`SegmentView`) or a whole response (`SequenceView`).

A view holds references and decodes nothing until it is asked: 64 rollouts of nine segments take about a millisecond,
and a picture becomes a PIL image only when a reward uses it.

Each reward function gets its own copies (`OwnRow`), made field by field on first access. If it changes tokens, pictures
or columns, other rewards and the training do not see it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from unidiff.sequence import Modality


@dataclass(eq=False, kw_only=True)
class SegmentView:
    """One sampled segment of one rollout, with its context.

    modality: TEXT or IMAGE.
    tokens:   LongTensor [n], ids in the model's vocabulary, without delimiters.
    text:     the decoded text; None for an image.
    pixels:   uint8 [H, W, 3]; None for text. `image` is the same as a PIL image.
    ended:    text: it reached its end token and was not cut off. Images: True.
    edited:   images: bool [h, w], True where a token was denoised again; None = every token was sampled.
    index:    ordinal among the row's sampled segments, from 0.
    round:    ordinal among the row's sampled segments of the same modality, from 0.
    last:     whether it is the row's last sampled segment.
    prompt:   the row's prompt: texts and PIL images in order.
    before:   the sampled segments before it in its row.
    task:     the row's example, as its task made it.
    columns:  the row's other fields, by name.
    """

    modality: Modality
    tokens: torch.Tensor
    text: str | None = None
    pixels: np.ndarray | None = None
    ended: bool = True
    edited: np.ndarray | None = None
    index: int = 0
    round: int = 0
    last: bool = False
    prompt: list[str | Image.Image] = field(default_factory=list)
    before: tuple[SegmentView, ...] = ()
    task: Any = None
    columns: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def image(self) -> Image.Image | None:
        """The picture in RGB; None for a text segment."""
        return None if self.pixels is None else Image.fromarray(self.pixels)

    @property
    def texts_before(self) -> list[str]:
        """Texts sampled before this segment, in order (the prompt's are in `prompt`)."""
        return [view.text for view in self.before if view.text is not None]

    @property
    def images_before(self) -> list[Image.Image]:
        """Pictures sampled before this segment, in order (the prompt's are in `prompt`)."""
        return [view.image for view in self.before if view.image is not None]

    @property
    def image_before(self) -> Image.Image | None:
        """The picture just before this segment: a sampled one, else the prompt's last, else None."""
        for view in reversed(self.before):
            if view.image is not None:
                return view.image
        pictures = [part for part in self.prompt if isinstance(part, Image.Image)]
        return pictures[-1] if pictures else None


@dataclass(eq=False)
class SequenceView:
    """A whole response, for rewards with `on="sequence"`. It has at least one segment."""

    segments: tuple[SegmentView, ...]

    @property
    def texts(self) -> list[str]:
        """The sampled texts in order."""
        return [view.text for view in self.segments if view.text is not None]

    @property
    def images(self) -> list[Image.Image]:
        """The sampled pictures in order."""
        return [view.image for view in self.segments if view.image is not None]

    @property
    def prompt(self) -> list[str | Image.Image]:
        """The row's prompt: texts and PIL images in order."""
        return self.segments[0].prompt

    @property
    def task(self) -> Any:
        """The row's example, as its task made it."""
        return self.segments[0].task

    @property
    def columns(self) -> dict[str, Any]:
        """The row's other fields, by name."""
        return self.segments[0].columns

    @property
    def ended(self) -> bool:
        """Whether the response ends with a text that reached its end token."""
        final = self.segments[-1]
        return final.modality == Modality.TEXT and final.ended


def parts_of(view: SegmentView | SequenceView) -> Iterator[tuple[str, str | Image.Image]]:
    """(role, text or picture) in order: the prompt, then the response up to and including the view."""
    segments = view.segments if isinstance(view, SequenceView) else (*view.before, view)
    yield from (("prompt", part) for part in view.prompt)
    for segment in segments:
        part = segment.text if segment.text is not None else segment.image
        assert part is not None
        yield "response", part


def prompt_text(view: SegmentView | SequenceView) -> str:
    """The texts of the prompt, joined by line breaks."""
    return "\n".join(part for part in view.prompt if isinstance(part, str))


def link_row(
    views: Iterable[SegmentView],
    *,
    prompt: Sequence[str | Image.Image] = (),
    task: Any = None,
    columns: dict[str, Any] | None = None,
) -> tuple[SegmentView, ...]:
    """Puts one row's segments in context: fills `index`, `round`, `last`, `before` and the row's own fields.

    views: the row's sampled segments in order, with only their content (modality, tokens, text or pixels, …). Returns
    new views.
    """
    views = list(views)
    shared_prompt, shared_columns = list(prompt), dict(columns or {})
    linked: list[SegmentView] = []
    rounds = dict.fromkeys(Modality, 0)
    for index, view in enumerate(views):
        linked.append(
            replace(
                view,
                index=index,
                round=rounds[view.modality],
                last=index == len(views) - 1,
                prompt=shared_prompt,
                before=tuple(linked),
                task=task,
                columns=shared_columns,
            )
        )
        rounds[view.modality] += 1
    return tuple(linked)


# ---------------------------------------------------------------------------------------------- copies


class OwnRow:
    """One reward's private copy of a row. Views are copied on first access."""

    def __init__(self, row: Sequence[SegmentView], memo: dict[int, Any]) -> None:
        self._row, self._memo = row, memo
        self._made: dict[int, SegmentView] = {}

    def __getitem__(self, index: int) -> SegmentView:
        if index not in self._made:
            self._made[index] = _own_view(self._row[index], self)
        return self._made[index]

    def first(self, count: int) -> tuple[SegmentView, ...]:
        """The first `count` views."""
        return tuple(self[index] for index in range(count))

    def whole(self) -> SequenceView:
        """The whole row, for a reward on sequences."""
        return SequenceView(self.first(len(self._row)))

    def copied(self, value: Any) -> Any:
        """A deep copy. An object that several rows share is copied once. Objects that cannot be copied (a lock, an open
        file) are shared."""
        try:
            return copy.deepcopy(value, self._memo)
        except Exception:
            return value


def own_rows(rows: Sequence[Sequence[SegmentView]]) -> list[OwnRow]:
    """Copies of a batch for one reward."""
    memo: dict[int, Any] = {}
    return [OwnRow(row, memo) for row in rows]


class _OwnView(SegmentView):
    """A view of an `OwnRow`. Mutable fields are copied on first access."""

    _source: SegmentView
    _row: OwnRow

    @cached_property
    def tokens(self) -> torch.Tensor:  # type: ignore[override]
        return self._source.tokens.clone()

    @cached_property
    def pixels(self) -> np.ndarray | None:  # type: ignore[override]
        return None if self._source.pixels is None else self._source.pixels.copy()

    @cached_property
    def edited(self) -> np.ndarray | None:  # type: ignore[override]
        return None if self._source.edited is None else self._source.edited.copy()

    @cached_property
    def prompt(self) -> list[str | Image.Image]:  # type: ignore[override]
        return [self._row.copied(part) for part in self._source.prompt]

    @cached_property
    def before(self) -> tuple[SegmentView, ...]:  # type: ignore[override]
        return self._row.first(len(self._source.before))

    @cached_property
    def task(self) -> Any:  # type: ignore[override]
        return self._row.copied(self._source.task)

    @cached_property
    def columns(self) -> dict[str, Any]:  # type: ignore[override]
        return {key: self._row.copied(value) for key, value in self._source.columns.items()}


_COPIED = frozenset({"tokens", "pixels", "edited", "prompt", "before", "task", "columns", "image"})


def _own_view(source: SegmentView, row: OwnRow) -> SegmentView:
    view = object.__new__(_OwnView)
    fields = source.__dict__
    view.__dict__.update({key: fields[key] for key in fields.keys() - _COPIED}, _source=source, _row=row)
    return view
