"""TraceRL's estimator: the rollout is replayed, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unidiff.estimators.estimator import Ask, Estimator
from unidiff.estimators.registry import register
from unidiff.estimators.view import Place, View


@register("trace")
@dataclass(frozen=True)
class Trace(Estimator):
    """ℓ_j = log p(o_j | the tokens of earlier slices visible, all others masked): each token is scored once.

    A slice holds the tokens that were committed in `merge` consecutive steps of their segment. With merge = 1 a token
    is scored in the state in which it was drawn, so ℓ_j is its log-probability under the sampler. The number of views
    is the largest number of slices of a segment; all segments are replayed side by side.

    One effect is not replayed. If an end token is drawn at a position before committed tokens, these were visible until
    then, but are not part of the rollout. This cannot happen with text_block=1, or in images.

    merge: steps per slice. Source: TraceRL (arXiv 2509.06949), which calls it shrink.
    """

    merge: int = 1

    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge < 1:
            raise ValueError(f"merge is {self.merge}; a slice has at least 1 step")

    def views(self, ask: Ask) -> list[View]:
        """One view per slice, in order. Raises ValueError if a sampled segment has no step map."""
        which, count = replay("trace", ask, self.merge)
        return [View(ask.among & (which >= k), factor=ask.among & (which == k)) for k in range(int(count.max()))]


def replay(name: str, ask: Ask, merge: int = 1) -> tuple[Tensor, Tensor]:
    """The slice of each token of `ask.among`, and the number of slices of its segment (at least 1), both int64 [B, L].
    Raises ValueError if a sampled segment has no step map. name: of the method, for the error."""
    if bool((ask.among & (ask.canvas.step < 0)).any()):
        kind = ask.modality.name.lower()
        raise ValueError(f"{name}: a sampled {kind} segment has no steps (Segment.step) to replay")
    which = slices(ask.canvas.step, ask.among, ask.place, merge)
    inside = which.masked_fill(~ask.among, 0)
    most = torch.zeros_like(inside).scatter_reduce_(1, ask.place.run, inside, "amax")
    return which, most.gather(1, ask.place.run) + 1


def slices(step: Tensor, among: Tensor, place: Place, merge: int) -> Tensor:
    """[B, L] int64: the slice of each chosen token, from 0 in each segment; undefined at the others.

    step: [B, L] int64. among: [B, L] bool. merge: distinct steps of a segment per slice.
    """
    row = torch.arange(len(step), device=step.device)[:, None]
    key = ((row * (place.run.max() + 1) + place.run) * (step.max() + 1) + step)[among]
    ordinal = torch.zeros_like(step)
    ordinal[among] = key.unique(return_inverse=True)[1]  # ordinal of its (row, segment, step)
    first = torch.full_like(step, step.numel()).scatter_reduce_(
        1, place.run, ordinal.masked_fill(~among, step.numel()), "amin"
    )
    return (ordinal - first.gather(1, place.run)) // merge
