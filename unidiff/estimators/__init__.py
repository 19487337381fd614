"""Log-probability estimators: which sampled tokens are masked, and scored, in each inner iteration.

A masked diffusion model has no cheap exact probability of a whole text or image. An estimator asks for the
probability of some tokens while they are masked and the others stand. Its choice is data, one `View` an inner
iteration: drawn once for a batch of rollouts, it serves the old, the reference and the new policy alike.

A method is a frozen dataclass in a file of its own, registered by name:

    @register("mine")
    @dataclass(frozen=True)
    class Mine:
        rate: float = 0.5

        def mask(self, canvas, place, modality, iteration, iterations, keys_B): ...

Dimensions: B rows, L columns of `Canvas.clean`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from unidiff import noise
from unidiff.sequence import Canvas, Modality

# First number of every noise stream drawn here, so that no sampler shares one ("view" in ASCII).
_STREAM = 0x76696577
_SEGMENT_STRIDE = 1 << 32  # noise counter of a token = segment · stride + offset: larger than any segment


@dataclass
class View:
    """What one inner iteration masks; both fields [B, L] bool.

    mask: sampled tokens that are masked and scored. hide: prompt tokens that are masked too, and not scored;
    None = the prompt stands as it is.
    """

    mask: Tensor
    hide: Tensor | None = None

    def rows(self, index: Tensor) -> View:
        return View(self.mask[index], None if self.hide is None else self.hide[index])


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


class Estimator(Protocol):
    """What a method gives.

    It may also have `hide(canvas, iteration, keys_B) -> BoolTensor [B, L]`, the prompt tokens to hide.
    """

    def mask(
        self,
        canvas: Canvas,
        place: Place,
        modality: Modality,
        iteration: int,
        iterations: int,
        keys_B: Tensor,
    ) -> Tensor:
        """[B, L] bool: sampled tokens of a modality to mask, at least one in each segment that has any.

        iteration: 0 … iterations-1. keys_B: [B] int64, noise keys.
        """
        ...


ESTIMATORS: dict[str, Callable[..., Estimator]] = {}
_E = TypeVar("_E", bound=type)


def register(name: str) -> Callable[[_E], _E]:
    """Class decorator: adds a method to the registry."""

    def add(estimator: _E) -> _E:
        ESTIMATORS[name] = estimator
        return estimator

    return add


def make(name: str, **options: Any) -> Estimator:
    """A registered estimator with its options. Raises ValueError if the name or an option is not known."""
    if name not in ESTIMATORS:
        raise ValueError(f"estimator {name!r} is not known{_nearest(name, ESTIMATORS)}")
    known = [f.name for f in fields(ESTIMATORS[name])]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise ValueError(f"estimator {name!r} has no option {option!r}{_nearest(option, known)}")
    return ESTIMATORS[name](**options)


def _nearest(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return f"; known: {', '.join(sorted(known)) or 'none'}" + (f"; nearest: {close[0]}" if close else "")


def token_uniform(canvas: Canvas, keys_B: Tensor, *stream: int) -> Tensor:
    """[B, L] float64 in (0, 1): a number for each content token.

    A function of the row's key, the stream, the token's segment and its offset in it: so not of its column,
    the padding or the batch.
    """
    counter = canvas.segment * _SEGMENT_STRIDE + canvas.clean.offset
    return noise.uniform(keys_B.to(counter.device), (_STREAM, *stream), counter)


def draw_views(canvas: Canvas, text: Estimator, image: Estimator, iterations: int, keys_B: Tensor) -> list[View]:
    """The views of all inner iterations: text masked by one estimator, images by the other, in one view.

    keys_B: [B] int64, one noise key a row. A view has one clean sequence: a prompt that one estimator hides
    is hidden for both. Raises ValueError if the keys do not fit the canvas or there is no iteration.
    """
    if keys_B.shape != (canvas.shape[0],):
        raise ValueError(f"keys_B has shape {tuple(keys_B.shape)}, but the canvas has {canvas.shape[0]} rows")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; at least 1 is needed")
    place = Place.of(canvas)
    views = []
    for i in range(iterations):
        mask = text.mask(canvas, place, Modality.TEXT, i, iterations, keys_B)
        mask = mask | image.mask(canvas, place, Modality.IMAGE, i, iterations, keys_B)
        hide = None
        for estimator in (text, image):
            if (hider := getattr(estimator, "hide", None)) is not None:
                hidden = hider(canvas, i, keys_B)
                hide = hidden if hide is None else hide | hidden
        views.append(View(mask, hide))
    return views


from unidiff.estimators import fading_out as fading_out  # noqa: E402  (each registers its method)
from unidiff.estimators import image_random as image_random  # noqa: E402
from unidiff.estimators import one_step as one_step  # noqa: E402
from unidiff.estimators import random_mask as random_mask  # noqa: E402
