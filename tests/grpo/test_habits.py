"""Habits of other trainers: groups without spread are replaced, texts that were cut off are not trained, the reference
follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from unidiff import reward
from unidiff.grpo.trainer import GRPOTrainer
from unidiff.rewards.reward import RewardError

Make = Callable[..., GRPOTrainer]


@reward(on="text")
def on_some_boards(segments: Any, **columns: Any) -> list[float]:
    """Says something on two boards of three only."""
    return [float(s.tokens.sum() % 7) / 6 if s.task.index % 3 else 0.5 for s in segments]


@reward(on="text")
def never(segments: Any, **columns: Any) -> list[float]:
    return [0.5 for _ in segments]


def boards(experience: Any) -> list[int]:
    return [e.index for e in experience.examples[:: len(experience.examples) // 4]]


def test_groups_without_spread_are_replaced(make_trainer: Make) -> None:
    settings = {"num_prompts": 4, "max_steps": 4}
    plain, refilled = ([], [])
    for refill, found in ((0, plain), (5, refilled)):
        trainer = make_trainer([on_some_boards], refill_groups=refill, **settings)
        for step in range(4):
            metrics, experience = trainer.step(step)
            found.append((boards(experience), metrics))
            assert ("refilled" in metrics) == bool(refill)
            spread = [bool(experience.useful_B[3 * g : 3 * g + 3].any()) for g in range(4)]
            assert refill == 0 or all(spread)
            assert all(e.index == b for e, b in zip(experience.examples[::3], boards(experience)))
    kept = [(a, b) for (x, _), (y, _) in zip(plain, refilled) for a, b in zip(x, y) if a % 3]
    assert len(kept) > 8 and all(a == b for a, b in kept)  # the others are left as they are
    replaced = sum(a != b for (x, _), (y, _) in zip(plain, refilled) for a, b in zip(x, y))
    assert replaced > 3 and sum(m["refilled"] for _, m in refilled) * 4 >= replaced


def test_it_is_bounded(make_trainer: Make) -> None:
    trainer = make_trainer([never], refill_groups=2)
    metrics, experience = trainer.step(0)
    assert metrics["refilled"] == 2.0 and not bool(experience.useful_B.any())


def test_a_lost_value_is_not_hidden(make_trainer: Make) -> None:
    """A group that lost a required value stays, and the run ends as it does without refills."""
    calls = []

    @reward(on="text", required=True)
    def judge(segments: Any, **columns: Any) -> list[float | None]:
        calls.append(len(segments))
        return [float("nan") for _ in segments] if len(calls) == 1 else [float(len(s.tokens)) for s in segments]

    with pytest.raises(RewardError, match="judge"):
        make_trainer([judge], refill_groups=2).step(0)
    assert len(calls) == 1


@pytest.mark.parametrize("assignment", ["joint", "normalize_then_sum", "factorized", "segment"])
def test_every_assignment_knows_groups_without_spread(make_trainer: Make, assignment: str) -> None:
    metrics, _ = make_trainer([never], refill_groups=1, assignment=assignment).step(0)
    assert metrics["refilled"] == 1.0


def test_a_resumed_run_refills_alike(
    make_trainer: Make, weights: Any, difference: Any, timeless: Any, tmp_path: Any
) -> None:
    settings = {"refill_groups": 2, "max_steps": 4}
    whole = make_trainer([on_some_boards], output_dir=str(tmp_path / "whole"), **settings)
    history = whole.train()

    def stop(step: int, metrics: Any, experience: Any) -> None:
        if step == 2:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        make_trainer([on_some_boards], save_steps=2, options={"on_step": stop}, **settings).train()
    resumed = make_trainer([on_some_boards], save_steps=2, resume=True, **settings)
    assert [timeless(m) for m in resumed.train()] == [timeless(m) for m in history]
    assert difference(weights(whole), weights(resumed)) == 0


def test_texts_that_were_cut_off_are_judged_and_not_trained(make_trainer: Make) -> None:
    plain, masked = (make_trainer(mask_truncated_completions=mask, text_steps=1) for mask in (False, True))
    (metrics, experience), (others, own) = plain.step(0), masked.step(0)
    cut = [(b, s) for b, row in enumerate(own.rows) for s, view in enumerate(row) if not view.ended]
    kept = [(b, s) for b, row in enumerate(own.rows) for s, view in enumerate(row) if view.ended]
    assert cut and kept
    assert others["reward/short_words"] == metrics["reward/short_words"]
    for b, s in cut:
        ordinal = len(own.rollouts[b].sequence.prompt) + s
        columns = (own.canvas.segment[b] == ordinal) & own.canvas.sampled[b]
        assert bool(experience.trained_BL[b][columns].all()) and not bool(own.trained_BL[b][columns].any())
        assert not bool(own.advantage_BL[b][columns].any())
        lines = own.table.explain(b, s, own.routed)
        assert "no advantage: it was cut off; its tokens are not trained" in str(lines)
    for b, s in kept:
        assert own.routed.advantage_BS[b, s] == experience.routed.advantage_BS[b, s]


@pytest.mark.parametrize(
    "adapters",
    [{}, pytest.param({"lora_rank": 4, "lora_alpha": 8.0}, marks=pytest.mark.slow)],
    ids=["weights", "adapters"],
)
def test_the_reference_follows(
    make_trainer: Make, weights: Any, difference: Any, timeless: Any, tmp_path: Any, adapters: dict[str, Any]
) -> None:
    """After every second step it is the policy: the KL is 0 then. A resumed run has the same one."""
    settings = {"beta": 0.1, "sync_ref_every": 2, "max_steps": 4, "learning_rate": 3e-3, "eval_size": 1, **adapters}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    history = whole.train()
    gaps = [m["kl/text"] for m in history]
    assert [gap < 1e-9 for gap in gaps] == [True, False, True, False]
    fixed = make_trainer(output_dir=str(tmp_path / "fixed"), **{**settings, "sync_ref_every": 0}).train()
    assert [m["kl/text"] < 1e-9 for m in fixed] == [True, False, False, False]

    def stop(step: int, metrics: Any, experience: Any) -> None:
        if step == 3:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        make_trainer(save_steps=3, options={"on_step": stop}, **settings).train()
    resumed = make_trainer(save_steps=3, resume=True, **settings)
    assert [timeless(m) for m in resumed.train()] == [timeless(m) for m in history]
    assert resumed.start == 3 and difference(weights(whole), weights(resumed)) == 0
