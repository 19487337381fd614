"""Rollouts in parts: rewards of one are worked out while the next is sampled, and nothing else changes."""

from __future__ import annotations

import asyncio
import threading

import pytest

from unidiff.rewards.reward import Cause, RewardError, reward


def spied(trainer):
    """An event for each call of the trainer's sampler, set when it begins."""
    begun = [threading.Event() for _ in range(9)]
    sample, calls = trainer.sampler.sample, iter(begun)

    def watched(*given):
        next(calls).set()
        return sample(*given)

    trainer.sampler.sample = watched
    return begun


def logging_reward(segments, log_extra, log_metric, **columns):
    log_extra("tokens", [int(s.tokens.sum()) for s in segments])
    log_metric("mean", 1.0)
    return [None if s.round else float(s.tokens.sum() % 5) for s in segments]


def test_nothing_depends_on_the_number_of_parts(make_trainer, rewards, weights, difference, timeless, tmp_path):
    """Of unequal parts, and of one a prompt."""
    logs = reward(logging_reward, on="image", timeout=60)
    runs = []
    for n in (1, 2, 5):
        seen = []
        options = {"on_step": lambda s, m, e, seen=seen: seen.append(e)}
        settings = {"num_prompts": 5, "rollout_parts": n, "output_dir": str(tmp_path / str(n))}
        trainer = make_trainer([*rewards, logs], options=options, **settings)
        runs.append((trainer, [timeless(m) for m in trainer.train()], seen))
    (whole, history, experiences), *others = runs
    for parted, its_history, its_experiences in others:
        assert its_history == history and difference(weights(parted), weights(whole)) == 0
        for a, b in zip(experiences, its_experiences, strict=True):
            assert [r.key for r in a.rollouts] == [r.key for r in b.rollouts]
            assert a.table.missing == b.table.missing and a.table.extra == b.table.extra
            assert str(a.table) == str(b.table)
            told, again = ([e.table.explain(i, 0, e.routed) for i in range(len(e.rollouts))] for e in (a, b))
            assert told == again


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_next_part_is_sampled_while_rewards_of_one_are_worked_out(make_trainer, rewards, asynchronous):
    waits, at_work = [], []

    def patient(segments):
        """Ends only once the part after its own is being sampled; never, if that waits for this."""
        at_work.append(1)
        number = len(waits)
        waits.append(number < 2)
        assert number == 2 or begun[number + 1].wait(30)
        assert at_work.pop() and not at_work  # a reward has one part at a time
        return [1.0] * len(segments)

    async def patient_async(segments):
        return await asyncio.to_thread(patient, segments)

    slow = reward(patient_async if asynchronous else patient, on="text", name="slow", timeout=60)
    trainer = make_trainer([*rewards, slow], num_prompts=3, rollout_parts=3)
    begun = spied(trainer)
    metrics, _ = trainer.step(0)
    assert waits == [True, True, False] and metrics["lost/slow"] == 0
    assert {"seconds/rollout", "seconds/decode", "seconds/reward"} < metrics.keys()


def test_a_lost_value_is_named_by_its_place_in_the_step(make_trainer, rewards):
    calls = []

    @reward(on="sequence", required=True)
    def vital(segments):
        calls.append(len(segments))
        return [1.0] * (len(segments) - 1) + [None if len(calls) == 2 else 1.0]

    with pytest.raises(RewardError, match="'vital' is required and has no value for sample 5: none"):
        make_trainer([*rewards, vital], rollout_parts=2).train()
    assert calls == [3, 3]


def test_the_breaker_counts_parts(make_trainer, rewards):
    broken = reward(lambda s: 1 / 0, name="broken", on="sequence", breaker=1)
    _, experience = make_trainer([*rewards, broken], rollout_parts=2).step(0)
    assert experience.table.lost == {("broken", Cause.RAISED): 3, ("broken", Cause.SKIPPED): 3}


def test_more_parts_than_prompts_are_refused(make_trainer):
    with pytest.raises(ValueError, match="rollout_parts is 3; a process has 2 prompts to part"):
        make_trainer(rollout_parts=3)
