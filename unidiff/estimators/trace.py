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

    A slice holds the tokens that were committed in `merge` consecutive steps of their segment's own. With merge = 1 a
    token is scored in the state in which it was drawn: ℓ_j is its log-probability under the sampler. As many views as
    the longest segment has slices; all segments are replayed side by side.

    One thing is not replayed: tokens that were committed behind a place where an end token was drawn later. They were
    seen until then, but are not part of the rollout. In blocks of one token, and in images, there are none.

    merge: steps a slice. Source: TraceRL (arXiv 2509.06949), where it is called shrink.
    """

    merge: int = 1

    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge < 1:
            raise ValueError(f"merge is {self.merge}; a slice has at least 1 step")

    def views(self, ask: Ask) -> list[View]:
        """Those of the replay, in order. Raises ValueError if a sampled segment has no step map."""
        which, count = replay("trace", ask, self.merge)
        return [View(ask.among & (which >= k), factor=ask.among & (which == k)) for k in range(int(count.max()))]


def replay(name: str, ask: Ask, merge: int = 1) -> tuple[Tensor, Tensor]:
    """int64 [B, L] each: the slice of each token that is asked for, and the number of slices of its segment (at least
    1). Raises ValueError if a sampled segment has no step map. name: of the method that asks."""
    if bool((ask.among & (ask.canvas.step < 0)).any()):
        kind = ask.modality.name.lower()
        raise ValueError(f"{name}: a sampled {kind} segment has no steps (Segment.step) to replay")
    which = slices(ask.canvas.step, ask.among, ask.place, merge)
    inside = which.masked_fill(~ask.among, 0)
    most = torch.zeros_like(inside).scatter_reduce_(1, ask.place.run, inside, "amax")
    return which, most.gather(1, ask.place.run) + 1


def slices(step: Tensor, among: Tensor, place: Place, merge: int) -> Tensor:
    """[B, L] int64: the slice of each chosen token, from 0 in each segment; means nothing at the others.

    step: [B, L] int64. among: [B, L] bool. merge: consecutive distinct steps of a segment in a slice.
    """
    row = torch.arange(len(step), device=step.device)[:, None]
    key = ((row * (place.run.max() + 1) + place.run) * (step.max() + 1) + step)[among]
    ordinal = torch.zeros_like(step)
    ordinal[among] = key.unique(return_inverse=True)[1]  # of the distinct (row, segment, step), in this order
    first = torch.full_like(step, step.numel()).scatter_reduce_(
        1, place.run, ordinal.masked_fill(~among, step.numel()), "amin"
    )
    return (ordinal - first.gather(1, place.run)) // merge
