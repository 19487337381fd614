"""Controls of interleaved rounds: responses in which the model does not draw its own pictures.

none       no pictures: texts only
oracle     after each text the correct picture, drawn by the task
shuffled   after each text a picture of another example
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unidiff.model import UnifiedModel
from unidiff.sampling.plan import Part
from unidiff.sequence import Modality, Prompt, Segment


def parts(plan: list[Part], kind: str, prompts: Sequence[Prompt]) -> list[Part]:
    """The parts of a response under a control. Raises ValueError for a response without rounds, and for a task that
    cannot draw pictures."""
    if kind == "own":
        return plan
    if not plan[0].open:
        raise ValueError(
            f"picture_source is {kind!r}, which is a control of interleaved rounds; this response has none"
        )
    if kind == "none":
        return [part for part in plan if part.kind == "text"]
    if any(prompt.simulate is None for prompt in prompts):
        raise ValueError(f"picture_source is {kind!r}, but the task has no `simulate` to draw them (docs/tasks.md)")
    return plan


def pictures(
    model: UnifiedModel, rows: Sequence[tuple[Prompt, Sequence[Segment]]], kind: str, grid: tuple[int, int]
) -> Tensor:
    """int64 [B, n]: ids of the pictures that the task draws for each row's texts. Raises ValueError if a picture has
    another grid."""
    drawn = []
    for prompt, segments in rows:
        texts = [s.tokens for s in segments if not s.prompt and s.modality is Modality.TEXT]
        assert prompt.simulate is not None
        drawn.append(prompt.simulate([model.decode_text(text) for text in texts], kind == "shuffled"))
    coded = model.encode_images(drawn)
    if coded[0][1] != grid:
        raise ValueError(f"the task's picture has {coded[0][1]} tokens, the prompt's {grid}")
    return torch.stack([tokens for tokens, _ in coded])
