"""The parts of a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from unidiff.sequence import Interleaved, Kind, Modality, plan_of

if TYPE_CHECKING:
    from unidiff.sampling.rollout import Rollout
    from unidiff.spec import ModelSpec


@dataclass(frozen=True)
class Part:
    """One part of a response: a text, a new picture, or an edit of the last picture (a new picture if there is none).
    open: a picture follows the text only if the text's end token announces it."""

    kind: Literal["text", "image", "edit"]
    open: bool = False


def parts_of(plan: Sequence[Kind], max_rounds: int) -> list[Part]:
    """Expands a plan into parts. Interleaved rounds end with a text, after at most `max_rounds` pictures."""
    parts: list[Part] = []
    for kind in plan:
        if kind == "interleaved":
            parts += [Part("text", open=True), Part("edit")] * max_rounds + [Part("text", open=True)]
        else:
            parts.append(Part("text" if kind == "understand" else kind))
    return parts


def longest(rollout: Rollout, spec: ModelSpec, max_rounds: int) -> dict[Modality, int]:
    """The maximum tokens of each modality in a response of this kind."""
    parts = parts_of(plan_of(rollout.writes), max_rounds)
    room = next((s.room for s in rollout.segments if s.modality is Modality.TEXT), None)
    sizes = spec.part_sizes(room, rollout.sequence.prompt.last_image())
    return {
        Modality.TEXT: sum(sizes[part.kind] for part in parts if part.kind == "text"),
        Modality.IMAGE: sum(sizes[part.kind] for part in parts if part.kind != "text"),
    }


def frame_of(spec: ModelSpec, grid: tuple[int, int], announced: bool, behind: tuple[int, ...] = ()) -> list[int]:
    """Ids of a masked image with its delimiters and row separators."""
    separator = [] if spec.row_separator is None else [spec.row_separator]
    begin = spec.before_image if announced else spec.image_begin
    return [*begin, *([spec.mask] * grid[1] + separator) * grid[0], *spec.image_end, *behind]


def last_images(
    prompts: Sequence[Interleaved], parts: Sequence[Part], spec: ModelSpec
) -> tuple[Tensor, tuple[int, int]]:
    """Ids [P, n] of the image to edit in each prompt, -1 = none, and their common grid."""
    images = [prompt.last_image() for prompt in prompts]
    drawn = next((part.kind for part in parts if part.kind != "text"), None)
    first = images[0]  # the other prompts' have the same grid
    grid = spec.image_grid if first is None or first.grid is None or drawn == "image" else first.grid
    none = torch.full((grid[0] * grid[1],), -1)
    shown = [
        none if im is None or im.grid != grid else im.tokens.masked_fill(im.tokens == spec.mask, -1) for im in images
    ]
    return torch.stack(shown), grid
