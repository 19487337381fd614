"""Rewards without a value: a step trains on what is left, and the metrics count what is lost."""

import math

import pytest

from unidiff.rewards.reward import RewardError, reward
from unidiff.sequence import Modality


def raises(segments, **columns):
    raise RuntimeError("the scorer is down")


FAULTS = {
    "raises": raises,
    "none": lambda segments, **columns: None,
    "nan": lambda segments, **columns: [math.nan for _ in segments],
    "wrong_length": lambda segments, **columns: [1.0],
    "strings": lambda segments, **columns: ["good" for _ in segments],
}


def test_a_reward_that_fails_loses_its_own_values_only(make_trainer, weights, difference, rewards):
    """Whatever its fault, and whatever it judges: the step is the one without it."""
    sound = make_trainer()
    reference, _ = sound.step(0)
    for fault, on in zip(FAULTS, ("text", "image", "sequence", "image", "text"), strict=True):
        trainer = make_trainer([*rewards, reward(FAULTS[fault], on=on, name="broken", weight=100.0)])
        metrics, _ = trainer.step(0)
        assert metrics["lost/broken"] == 1 and metrics["lost/bright"] == 0 and "reward/broken" not in metrics, fault
        assert metrics["reward/bright"] == reference["reward/bright"], fault
        assert difference(weights(trainer), weights(sound)) == 0, fault


def test_a_share_of_lost_values_is_counted(make_trainer, rewards):
    @reward(on="text")
    def flaky(segments, **columns):
        return [math.inf if i == 0 else None if i == 1 else 1.0 for i in range(len(segments))]

    metrics, experience = make_trainer([*rewards, flaky]).step(0)
    texts = int((experience.table.modality_BS == Modality.TEXT).sum())
    assert metrics["lost/flaky"] == pytest.approx(1 / texts, rel=1e-5)
    assert metrics["not_applicable/flaky"] == pytest.approx(1 / texts, rel=1e-5)
    assert metrics["reward/flaky"] == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_a_required_reward_that_fails_ends_the_run(make_trainer, fault, weights, difference, rewards):
    trainer = make_trainer([*rewards, reward(FAULTS[fault], on="text", name="vital", required=True)])
    before = weights(trainer)
    with pytest.raises(RewardError, match="vital"):
        trainer.train()
    assert difference(before, weights(trainer)) == 0


@pytest.mark.parametrize("assignment", ["joint", "factorized", "segment"])
def test_a_group_that_lost_all_its_values_is_left_out(make_trainer, assignment, rewards):
    """The others train as if it had not been there."""

    @reward(on="text")
    def half_blind(segments, **columns):
        first = segments[0].task.index
        return [None if s.task.index == first else v for s, v in zip(segments, rewards[0](segments))]

    trainer = make_trainer([half_blind], assignment=assignment)
    metrics, experience = trainer.step(0)
    weight = experience.weight_BL(0)
    assert weight[:3].sum() == 0 and weight[3:].sum() > 0
    trained = weight * (experience.advantage_BL != 0)
    assert metrics["tokens/text"] == (trained * (experience.canvas.modality == Modality.TEXT)).sum()


def test_all_values_lost_trains_nothing(make_trainer, weights, difference):
    trainer = make_trainer([reward(raises, on="text")], num_iterations=2)
    before = weights(trainer)
    metrics, _ = trainer.step(0)
    assert metrics["lost/raises"] == 1 and metrics["tokens/text"] == 0 and metrics["grad_norm"] == 0
    assert all(math.isfinite(v) for v in metrics.values())
    assert difference(before, weights(trainer)) == 0
