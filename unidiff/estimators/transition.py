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
    the step committed. They share its ratio.

    samples: steps that an inner iteration draws of each segment, one in each of as many equal parts of the rollout;
    their log-probabilities are added. mean: divide by the number of tokens, so that the clip range fits steps of any
    size.

    The paper can add a term for what stays masked: the log of the probability of all tokens that are less likely than
    the least sure one that was committed. It needs whole distributions, and an estimator gets the log-probabilities of
    the drawn tokens alone, so it is not here. The paper goes through all steps; here each inner iteration draws its
    own. Source: Mask-GRPO (arXiv 2510.13418).
    """

    samples: int = 1
    mean: bool = False

    unit: ClassVar[Literal["token", "segment"]] = "segment"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; at least 1 step is needed")

    def views(self, ask: Ask) -> list[View]:
        """`samples` of them; a segment with fewer steps scores each of its steps once. Raises ValueError without a step
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
