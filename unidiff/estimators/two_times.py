"""DiFFPO's estimator: the prompt, and one state of the rollout on the way."""

from __future__ import annotations

from dataclasses import dataclass

from unidiff.estimators.estimator import Ask, Estimator
from unidiff.estimators.registry import register
from unidiff.estimators.trace import replay
from unidiff.estimators.view import View


@register("two_times")
@dataclass(frozen=True)
class TwoTimes(Estimator):
    """ℓ_j = log p(o_j | all masked) for tokens that were committed before a step τ of their segment, and
    log p(o_j | what was committed before τ visible) for the others: two views instead of `trace`'s one a step.

    τ is uniform over the steps of the segment but its first. A segment of one step has one view.

    The paper weighs the loss by the clipped ratio of the sampler's probability to this one; for that, set
    `importance_cap`. Source: DiFFPO (arXiv 2510.02212), two-times mean field.
    """

    def views(self, ask: Ask) -> list[View]:
        """Two: everything masked, and what was committed from τ on. Raises ValueError without a step map."""
        which, count = replay("two_times", ask)
        cut = (ask.segment_uniform() * (count - 1)).long() + 1
        early = ask.among & (which < cut)
        late = ask.among & (which >= cut)
        return [View(ask.among, factor=early), View(late)]
