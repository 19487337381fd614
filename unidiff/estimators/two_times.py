"""DiFFPO's estimator: the fully masked state, and one intermediate state of the rollout."""

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
    log p(o_j | tokens committed before τ visible) for the others. So there are two views, where `trace` has one per
    step.

    τ is uniform over the segment's steps except the first. A segment of one step is scored in the first view only.

    The paper weighs the loss by a clipped ratio between this probability and the sampler's; set `importance_cap` for
    that. Source: DiFFPO (arXiv 2510.02212), two-times mean field.
    """

    def views(self, ask: Ask) -> list[View]:
        """Two views: all tokens masked; tokens committed from τ on masked. Raises ValueError without a step map."""
        which, count = replay("two_times", ask)
        cut = (ask.segment_uniform() * (count - 1)).long() + 1
        early = ask.among & (which < cut)
        late = ask.among & (which >= cut)
        return [View(ask.among, factor=early), View(late)]
