"""Rollouts that are not what is scored: how far, measured, and the truncated weight that corrects it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tables import each
from unidiff import GRPOConfig, UnifiedModel
from unidiff.grpo.experience import Experience
from unidiff.grpo.trainer import GRPOTrainer
from unidiff.tasks import resolve

# Each text token is written alone, so that the replay sees what the rollout saw.
EXACT: dict[str, Any] = {"text_block": 1, "text_estimator": "trace", "image_estimator": "trace"}


def drawn_with(experience: Experience, factor: float) -> Experience:
    """The same experience, as if each token had been drawn with `factor` times its probability."""
    rollouts = []
    for rollout in experience.rollouts:
        parts = [
            s if s.prompt else dataclasses.replace(s, probability=s.probability * factor) for s in rollout.sequence
        ]
        rollouts.append(dataclasses.replace(rollout, sequence=type(rollout.sequence)(parts)))
    return dataclasses.replace(experience, rollouts=rollouts)


def gradient(trainer: GRPOTrainer, experience: Experience) -> torch.Tensor:
    update = trainer.update
    update.accumulate(update.batches(experience, 0), update.denominators(experience, 0))
    found = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    trainer.optimizer.zero_grad(set_to_none=True)
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).norm()) < 1e-4 * float(expected.norm())


def test_exact_rollouts_do_not_drift(make_trainer: Callable[..., GRPOTrainer]) -> None:
    metrics = make_trainer(**EXACT, check_ratio_every=2, max_steps=3).train()
    assert ["rollout_drift" in m for m in metrics] == [True, False, True]
    for m in metrics[::2]:
        assert 0 < m["rollout_drift"] <= m["rollout_drift_max"] < 1e-4


def test_another_temperature_drifts(make_trainer: Callable[..., GRPOTrainer]) -> None:
    """Rollouts at one temperature and scores at another: what public code does by mistake is seen."""
    trainer = make_trainer(**EXACT)
    _, experience = trainer.step(0)
    factor = 0.5
    shifted = drawn_with(experience, factor)
    batches = trainer.update.batches(shifted, 0)
    found = trainer.update.first_ratio(0, shifted, batches, {})
    assert found["rollout_drift"] == pytest.approx(0.693, abs=0.1)  # log 2, but for the step that was trained
    assert found["rollout_drift_max"] >= found["rollout_drift"]


def test_approximate_caches_drift(published: Callable[[str], Path], tmp_path: Path) -> None:
    def drift(cache: Any) -> float:
        config = GRPOConfig(
            text_estimator="trace", text_block=8, text_steps=32, text_threshold=None, approximate_cache=cache,
            num_prompts=1, num_generations=2, max_steps=1, save_steps=0, quiet=True, output_dir=str(tmp_path / cache),
        )  # fmt: skip
        model = UnifiedModel.from_pretrained(published("llada"), text_length=32)
        return GRPOTrainer(model, resolve("countdown"), config).train()[0]["rollout_drift_max"]

    assert drift("none") < 1e-4 < drift("dual")


def test_the_weight_scales_the_policy_loss_and_is_cut(make_trainer: Callable[..., GRPOTrainer]) -> None:
    plain, capped = make_trainer(**EXACT), make_trainer(**EXACT, importance_cap=4.0)
    for trainer in (plain, capped):
        trainer.model.requires_grad_(True)
    _, experience = plain.step(0)
    capped.model.load_state_dict(plain.model.state_dict())
    found = {f: gradient(capped, drawn_with(experience, f)) for f in (1.0, 0.8, 1e-3)}
    values = plain.update.old_values  # of one iteration: none
    assert values(experience) is None
    expected = gradient(plain, experience)
    # After a step the policy has moved a little, so the weights are near 1, 1 / 0.8 and above the cap.
    assert close(found[0.8], found[1.0] / 0.8)
    assert close(found[1e-3], 4.0 * expected)
    assert 0 < float((found[1.0] - expected).norm()) < 0.5 * float(expected.norm())


@each(
    ("settings", "message"),
    [
        ({"importance_cap": 0.0}, r"importance_cap is 0\.0; it must be above 0"),
        (
            {"importance_cap": 1.0, "text_estimator": "elbo"},
            "importance_cap needs .* text_estimator does not estimate it",
        ),
        ({"importance_cap": 1.0, "image_estimator": "spg"}, "image_estimator does not estimate it"),
    ],
)
def test_what_does_not_fit_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**settings)
