"""Mask-GRPO's estimator: the probability of one step of the rollout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from unidiff.estimators.estimator import Ask, Estimator
from unidiff.estimators.registry import register
from unidiff.estimators.trace import replay
from unidiff.estimators.view import View


@register("transition")
@dataclass(frozen=True)
class Transition(Estimator):
    """A segment's value is log p of one of its steps: Σ_j log p(o_j | the state before that step) over the tokens that
    the step committed. These tokens share one ratio.

    samples: steps drawn per segment in an inner iteration, one from each of `samples` equal parts of the rollout; their
    log-probabilities are added. mean: divide by the number of tokens, so that one clip range fits steps of any size.

    Differences from the paper: It goes through all steps; here each inner iteration draws its own. Its optional term
    for tokens that stay masked (the log-probability of all tokens less likely than the least confident committed one)
    is left out: it needs whole distributions, and an estimator gets only the drawn tokens' log-probabilities.
    Source: Mask-GRPO (arXiv 2510.13418).
    """

    samples: int = 1
    mean: bool = False

    unit: ClassVar[Literal["token", "segment"]] = "segment"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; at least 1 step is needed")

    def views(self, ask: Ask) -> list[View]:
        """`samples` views; a segment with fewer steps scores each of its steps once. Raises ValueError without a step
        map."""
        which, count = replay("transition", ask)
        level, views = ask.segment_uniform(), []
        before = count.new_full(count.shape, -1)
        for k in range(self.samples):
            step = ((k + level) / self.samples * count).long()
            views.append(View(ask.among & (which >= step), factor=ask.among & (which == step) & (step != before)))
            before = step
        if not self.mean:
            return views
        scored = ask.place.total(sum((view.factors.float() for view in views), start=level.new_zeros(()).float()))
        return [View(view.mask, factor=view.factors / scored.clamp(min=1)) for view in views]
