"""The texts of rollouts: which tokens are committed when, and how a text ends a rollout."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.covering import slow_after
from tests.tables import each
from unidiff.model import UnifiedModel
from unidiff.sampling.rollout import Rollout, Stop
from unidiff.sampling.sampler import rollout as respond
from unidiff.sequence import Interleaved, Modality, Segment

Sample = Callable[..., list[Rollout]]
Lean = Callable[[UnifiedModel, dict[int, float]], UnifiedModel]
ORDERS = ["confidence", "margin", "entropy", "random"]


def texts(rollouts: list[Rollout]) -> list[Segment]:
    return [s for r in rollouts for s in r.segments if s.modality is Modality.TEXT]


def drawn(rollout: Rollout) -> list[tuple[list[int], list[int]]]:
    return [(s.tokens.tolist(), s.step.tolist()) for s in rollout.segments]


# ---------------------------------------------------------------- which tokens when


def test_texts_end_at_their_first_end_token(model: UnifiedModel, prompts: list[Interleaved], sample: Sample) -> None:
    for settings in ({}, {"text_threshold": None, "text_order": "random"}, {"text_threshold": 0.0}):
        found = texts(sample(prompts * 3, range(12), **settings))
        ends = [[t in model.spec.text_end for t in s.tokens.tolist()] for s in found]
        assert all(not any(e[:-1]) for e in ends) and any(e[-1] for e in ends) and not all(e[-1] for e in ends)
        assert all(e[-1] or len(e) == model.spec.text_length for e in ends)
        assert all((s.step >= 0).all() and s.edited is None for s in found)
        low, high = model.spec.text_range
        assert all(s.tokens.min() >= low and s.tokens.max() < high for s in found)


@pytest.fixture(scope="module")
def endless(model: UnifiedModel, lean: Lean) -> UnifiedModel:
    """A model that never ends a text."""
    return lean(model, dict.fromkeys(model.spec.text_end, -60.0))


@pytest.mark.parametrize("settings", [{"text_threshold": 0.15}, {"text_threshold": None, "text_steps": 5}])
def test_blocks_of_a_row_do_not_wait_for_others(
    settings: dict[str, Any], endless: UnifiedModel, prompts: list[Interleaved], sample: Sample
) -> None:
    """A row that is done with a block early draws the same numbers in the next as it does alone."""
    rows, keys, settings = prompts * 2, list(range(8)), {"of": endless, "text_block": 3, **settings}
    together = sample(rows, keys, **settings)
    if settings["text_threshold"]:
        assert len({int(t.step[:3].max()) for t in texts(together)}) > 1
    for i, rollout in enumerate(together):
        assert drawn(rollout) == drawn(sample([rows[i]], [keys[i]], **settings)[0])
        steps = texts([rollout])[0].step
        assert steps.unique().tolist() == list(range(int(steps.max()) + 1))  # no gap in its step map


@pytest.mark.parametrize(
    ("order", "steps"), [*zip(ORDERS, (1, 3, 5, 20)), ("confidence", 8), ("random", 3), ("margin", 5)]
)
def test_fixed_steps_commit_the_published_plan(order: str, steps: int, endless: UnifiedModel, sample: Sample) -> None:
    """k // T tokens a step, and one more in the first k mod T."""
    taken = min(steps, 8)
    plan = sorted((8 // taken + (i < 8 % taken) for i in range(taken)), reverse=True)
    for text in texts(sample(of=endless, text_threshold=None, text_steps=steps, text_order=order)):
        assert text.step.long().bincount().tolist() == plan


@each(("block", "steps"), [(4, 8), (4, 4), (4, 2), (3, 8), (1, 8), (8, 4), (50, 4)])
def test_blocks_are_written_from_left_to_right(block: int, steps: int, endless: UnifiedModel, sample: Sample) -> None:
    found = sample(of=endless, text_threshold=None, text_steps=steps, text_block=block)
    for rollout in found:
        (text,) = rollout.segments
        parts = text.step.split(min(block, 8))
        assert all(int(a.max()) < int(b.min()) for a, b in itertools.pairwise(parts))
        taken = sum(min(-(-steps * len(p) // 8), len(p)) for p in parts)
        assert rollout.compute["text"].forwards == taken == int(text.step.max()) + 1


def test_orders_differ(endless: UnifiedModel, sample: Sample) -> None:
    steps = {}
    for order in ORDERS:
        found = texts(sample(of=endless, text_threshold=None, text_order=order))
        steps[order] = tuple(tuple(s.step.tolist()) for s in found)
    assert len(set(steps.values())) == 4


def test_confident_tokens_come_first(endless: UnifiedModel, prompts: list[Interleaved], sample: Sample) -> None:
    """With one token a step, the first is the likeliest of those drawn while all were masked."""
    settings = {"text_threshold": None, "text_order": "confidence", "greedy": True}
    one, eight = (sample(of=endless, text_steps=n, **settings) for n in (1, 8))
    for a, b in zip(texts(one), texts(eight)):
        assert int(a.probability.argmax()) == int(b.step.argmin())


def test_thresholds(endless: UnifiedModel, sample: Sample) -> None:
    at_once, one_by_one, some = (texts(sample(of=endless, text_threshold=t)) for t in (0.0, 1.0, 0.3))
    assert all((s.step == 0).all() for s in at_once)
    assert all(sorted(s.step.tolist()) == list(range(8)) for s in one_by_one)
    assert {int(s.step.max()) for s in some} - {0, 7}
    for text in some:
        for step in range(int(text.step.max()) + 1):
            now = text.probability[text.step == step]
            assert len(now) == 1 or (now >= 0.3 - 1e-6).sum() >= len(now) - 1


def test_entropy_bounds(endless: UnifiedModel, sample: Sample) -> None:
    """0 commits one token a step, a large bound all at once; the threshold is not asked."""
    settings = {"of": endless, "text_threshold": 0.0}
    one_by_one, at_once, some = (texts(sample(text_entropy_bound=b, **settings)) for b in (0.0, 1e3, 6.0))
    assert all(sorted(s.step.tolist()) == list(range(8)) for s in one_by_one)
    assert all((s.step == 0).all() for s in at_once)
    assert {int(s.step.max()) for s in some} - {0, 7}


@each(("block", "passes"), [(None, 3), (4, 4), (3, 5), (1, 8)])
def test_dilated_texts(block: int | None, passes: int, endless: UnifiedModel, sample: Sample) -> None:
    for rollout in sample(of=endless, text_order="dilated", text_block=block):
        (text,) = rollout.segments
        assert rollout.compute["text"].forwards == passes == int(text.step.max()) + 1
        if block is None:
            assert text.step.tolist() == [0, 2, 1, 2, 0, 2, 1, 2]


@pytest.mark.parametrize(
    "rule", [{"text_threshold": 0.0}, {"text_threshold": None, "text_steps": 2}, {"text_entropy_bound": 1e3}]
)
@pytest.mark.parametrize("gap", [2, 4, 8])
def test_tokens_of_one_step_stand_apart(rule: dict[str, Any], gap: int, endless: UnifiedModel, sample: Sample) -> None:
    found = texts(sample(of=endless, text_gap=gap, **rule))
    for text in found:
        assert (text.step >= 0).all()
        for step in text.step.unique().tolist():
            left = int((text.step >= step).sum())
            places = (text.step == step).nonzero()[:, 0]
            assert (places.diff() >= max(2, left * gap // 8)).all()
    assert any(len(s.step.unique()) < 8 for s in found) or gap == 8


@pytest.mark.parametrize("threshold", slow_after(1, [0.9, None]))
def test_greedy_needs_no_key(threshold: float | None, prompts: list[Interleaved], sample: Sample) -> None:
    for edit in ("region", "full"):
        settings = {"text_threshold": threshold, "edit": edit}
        for greedy in (True, False):
            a, b = (sample(prompts, keys, greedy=greedy, **settings) for keys in (range(4), range(50, 54)))
            assert ([*map(drawn, a)] == [*map(drawn, b)]) is greedy


# ---------------------------------------------------------------- how rollouts end


ENDS = [("answer", Stop.ANSWERED, 0), ("image", Stop.MAX_ROUNDS, 2), ("none", Stop.NO_END, 0)]
WAYS = [{}, {"text_threshold": None}, {"text_block": 4}, {"greedy": True}]


@pytest.mark.parametrize(
    ("end", "stop", "rounds", "settings"), [(*ENDS[i % 3], WAYS[(i + i // 3) % 4]) for i in range(6)], ids=str
)
def test_every_stop_can_be_reached(
    end: str,
    stop: Stop,
    rounds: int,
    settings: dict[str, Any],
    model: UnifiedModel,
    endless: UnifiedModel,
    lean: Lean,
    sample: Sample,
) -> None:
    answer = next(e for e in model.spec.text_end if e != model.spec.image_next)
    wanted = {"answer": answer, "image": model.spec.image_next, "none": None}[end]
    leaning = endless if wanted is None else lean(model, {wanted: 60.0})
    for rollout in sample(of=leaning, **settings):
        assert rollout.stop is stop and sum(s.modality is Modality.IMAGE for s in rollout.segments) == rounds
        assert [s.modality for s in rollout.segments] == [Modality.TEXT, Modality.IMAGE] * rounds + [Modality.TEXT]
        last = int(rollout.segments[-1].tokens[-1])
        assert last == wanted if wanted is not None else last not in model.spec.text_end
        assert len(rollout.segments[-1]) == (model.spec.text_length if wanted is None else 1)


@each("settings", [{"image_temperature": 1e-46}, {"text_temperature": 1e-320}, {"text_guidance": 1e39}])
def test_settings_too_extreme_for_float32_end_in_one_line(
    settings: dict[str, Any], model: UnifiedModel, lean: Lean
) -> None:
    drawing = lean(model, {model.spec.image_next: 60.0})
    with pytest.raises(FloatingPointError, match="log-probabilities are NaN: a temperature or guidance is extreme"):
        respond(drawing, ["find the goal"], edit="full", **settings)


@each(
    ("settings", "error", "message"),
    [
        ({"text_step": 3}, TypeError, "the sampler has no setting 'text_step'; did you mean 'text_steps'?"),
        ({"seed": 1.5}, ValueError, "seed is 1.5; it must be a whole number"),
        ({"seed": "x"}, ValueError, "seed is 'x'; it must be a whole number"),
    ],
)
def test_a_setting_of_a_rollout_is_named(
    settings: dict[str, Any], error: type[Exception], message: str, model: UnifiedModel
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        respond(model, ["find the goal"], edit="full", **settings)
