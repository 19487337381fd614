"""Schedules in the trainer: turns, exact resume, the gradient, and that model and schedule do not touch each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from unidiff import UnifiedModel
from unidiff.grpo.schedule_update import by_width
from unidiff.grpo.trainer import GRPOTrainer
from unidiff.schedules import SCHEDULES

Make = Callable[..., GRPOTrainer]


def parameters(trainer: GRPOTrainer) -> torch.Tensor:
    assert trainer.scheduled is not None
    return torch.cat([p.detach().flatten().clone() for p in trainer.scheduled.schedule.parameters()])


@pytest.mark.parametrize("turns", ["together", "alternate", "alone"])
def test_turns(make_trainer: Make, weights: Any, difference: Any, turns: str) -> None:
    trainer = make_trainer(schedule="planner", schedule_turns=turns, text_steps=8)
    model, schedule = weights(trainer), parameters(trainer)
    trained = []
    for step in range(2):
        metrics, _ = trainer.step(step)
        trained.append((difference(model, weights(trainer)) > 0, not torch.equal(schedule, parameters(trainer))))
        assert ("grad_norm" in metrics, "schedule/grad_norm" in metrics) == trained[-1]
        model, schedule = weights(trainer), parameters(trainer)
    expected = {
        "together": [(True, True)] * 2,
        "alternate": [(True, False), (False, True)],
        "alone": [(False, True)] * 2,
    }
    assert trained == expected[turns]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_policys_ratio_is_1_with_a_schedule_in_play(make_trainer: Make, name: str) -> None:
    settings: dict[str, Any] = {"text_estimator": "trace", "image_estimator": "trace", "text_temperature": 0.8}
    trainer = make_trainer(schedule=name, num_iterations=2, text_block=1 if name == "bound" else None, **settings)
    metrics, experience = trainer.step(0)
    assert metrics["ratio_first_iteration_max_dev"] < 1e-4
    if name == "controls":
        assert experience.warmth_BL is not None
        assert float((experience.warmth_BL - 1)[experience.canvas.sampled].abs().max()) > 0.01
    assert metrics["schedule/steps"] >= 1 and metrics["schedule/tokens"] >= 1


def test_the_update_raises_what_was_rewarded(make_trainer: Make) -> None:
    """Its first gradient is that of −Σ A log p over the steps, divided by their number."""
    trainer = make_trainer(schedule="planner", schedule_turns="alone", text_steps=8)
    assert trainer.scheduled is not None
    schedule = trainer.scheduled.schedule
    _, experience = trainer.step(0)
    parts = by_width(experience)
    count = sum(len(old) for *_, old, _ in parts)
    assert count > 10

    def value() -> torch.Tensor:
        return sum((schedule.log_prob(f, a) * w).sum() for f, a, _, w in parts) / count  # type: ignore[return-value]

    expected = torch.autograd.grad(-value(), list(schedule.parameters()))
    found = []
    for features, action, _, advantage in parts:
        old = schedule.log_prob(features, action).detach()  # as of the schedule now
        loss, beyond = trainer.scheduled.loss(features, action, old, advantage)
        assert not beyond
        found.append(torch.autograd.grad(loss / count, list(schedule.parameters())))
    for k, wanted in enumerate(expected):
        assert torch.allclose(sum(f[k] for f in found), wanted, atol=1e-6)  # type: ignore[arg-type]


def test_a_resumed_run_is_one_that_never_stopped(
    make_trainer: Make, weights: Any, difference: Any, timeless: Any, tmp_path: Any
) -> None:
    settings = {"schedule": "controls", "max_steps": 4, "schedule_turns": "alternate"}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    history = whole.train()

    def stop(step: int, metrics: Any, experience: Any) -> None:
        if step == 2:
            raise RuntimeError("killed")

    broken = make_trainer(save_steps=2, options={"on_step": stop}, **settings)
    with pytest.raises(RuntimeError, match="killed"):
        broken.train()
    resumed = make_trainer(save_steps=2, resume=True, **settings)
    again = resumed.train()
    assert resumed.start == 2 and [timeless(m) for m in again] == [timeless(m) for m in history]
    assert difference(weights(whole), weights(resumed)) == 0
    assert torch.equal(parameters(whole), parameters(resumed))


def test_a_trained_schedule_is_saved_and_trained_further(make_trainer: Make, tmp_path: Any) -> None:
    trainer = make_trainer(schedule="controls:share=0.4", max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    again = UnifiedModel.from_pretrained(tmp_path / "model")
    further = make_trainer(policy=again, schedule="controls:share=0.4", output_dir=str(tmp_path / "more"))
    assert torch.equal(parameters(further), parameters(trainer))
    other = make_trainer(policy=again, schedule="controls:share=0.2", output_dir=str(tmp_path / "other"))
    assert not torch.equal(parameters(other), parameters(trainer))
    kept = make_trainer(policy=UnifiedModel.from_pretrained(tmp_path / "model"), output_dir=str(tmp_path / "kept"))
    _, experience = kept.step(0)
    assert kept.scheduled is None and any(s.choices is not None for r in experience.rollouts for s in r.segments)


def test_a_wrong_schedule_is_an_error_before_training(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match="schedule 'contrls' is not known; did you mean 'controls'"):
        make_trainer(schedule="contrls")
    with pytest.raises(ValueError, match=r"schedule_learning_rate is 0\.0; it must be above 0"):
        make_trainer(schedule="controls", schedule_learning_rate=0.0)
