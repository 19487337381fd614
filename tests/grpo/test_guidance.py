"""GRPO on guided rollouts: the ratio is 1 at the first step, and the run says when it is not."""

from __future__ import annotations

import pytest

from tests.covering import couples
from unidiff.estimators import ESTIMATORS

SCALES = {"text_guidance": 0.5, "image_guidance": 1.5, "picture_guidance": 0.7}


@pytest.mark.parametrize(
    ("text", "image"),
    [both if i < 2 else pytest.param(*both, marks=pytest.mark.slow) for i, both in enumerate(couples(ESTIMATORS))],
)
def test_guided_scoring_has_ratio_one(make_trainer, text, image):
    """Invariant 1, of guided rollouts that the policy sampled, for every estimator."""
    trainer = make_trainer(num_iterations=2, text_estimator=text, image_estimator=image, **SCALES)
    metrics, experience = trainer.step(0)
    assert experience.guidance is not None and len(experience.guidance.canvases) == 2
    assert metrics["grad_norm"] > 0
    assert metrics.get("ratio_first_iteration_max_dev", 0.0) < 1e-4


def test_unguided_scoring_is_said(make_trainer):
    trainer = make_trainer(num_iterations=1, check_ratio_every=1, score_guidance=False, **SCALES)
    metrics, experience = trainer.step(0)
    assert experience.guidance is None
    assert metrics["guidance_ratio_max_dev"] > 1e-3
    guided = make_trainer(num_iterations=1, check_ratio_every=1, **SCALES)
    assert "guidance_ratio_max_dev" not in guided.step(0)[0]
