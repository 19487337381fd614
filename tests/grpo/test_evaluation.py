"""Held-out evaluation: figures, and what they may not depend on."""

import numpy as np
import pytest

from unidiff.grpo.evaluation import evaluate, mean_compute, means
from unidiff.sampling.config import SamplerConfig

SAMPLER = SamplerConfig(edit="random", edit_share=0.2, max_rounds=2, text_steps=3, image_steps=2)
COUNTS = ("forwards", "token_forwards", "flops")


def tokens(evaluation):
    return [[s.tokens.tolist() for s in r.segments] for r in evaluation.rollouts]


@pytest.fixture(scope="module")
def whole(model, task):
    return evaluate(model, task, SAMPLER, range(7))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_independent_of_the_batch_size(model, task, whole, batch_size):
    cut = evaluate(model, task, SAMPLER, range(7), batch_size=batch_size)
    assert tokens(cut) == tokens(whole) and cut.figures == whole.figures
    assert all(getattr(cut.compute.total, k) == pytest.approx(getattr(whole.compute.total, k)) for k in COUNTS)


def test_a_prompt_gets_the_same_response_in_any_company(model, task, whole):
    some = evaluate(model, task, SAMPLER, [5, 2])
    assert tokens(some) == [tokens(whole)[5], tokens(whole)[2]]


def test_seed_and_split_matter(model, task, whole):
    assert tokens(evaluate(model, task, SAMPLER, range(7), seed=1)) != tokens(whole)
    other = evaluate(model, task, SAMPLER, range(2), split="dev")
    assert [e.board for e in other.examples] == [task.example("dev", i).board for i in range(2)]


def test_figures_are_the_means_of_the_rows(task, whole):
    assert whole.per_row.keys() >= whole.figures.keys() >= {"success", "format"}
    for name, values in task.measure(whole.rows, whole.examples).items():
        np.testing.assert_array_equal(values, whole.per_row[name])
        kept = values[~np.isnan(values)]
        assert whole.figures.get(name) == (pytest.approx(kept.mean()) if len(kept) else None)
    assert np.isnan(whole.per_row["image_exact"]).any()  # responses without a picture do not count as wrong ones


def test_means_leave_missing_values_out():
    found = means({"a": np.array([1.0, np.nan, 0.0, 0.5]), "b": np.array([np.nan]), "c": np.array([])})
    assert found == {"a": 0.5}  # what applies to no row has no mean: it is not 0


def test_mean_cost(whole):
    mean = mean_compute(whole.rollouts)
    assert mean == whole.compute
    for kind in COUNTS:
        expected = np.mean([getattr(r.compute.total, kind) for r in whole.rollouts])
        assert getattr(mean.total, kind) == pytest.approx(expected)
    assert mean_compute([]).total.forwards == 0


def test_greedy_and_sampled(make_trainer):
    held = make_trainer(eval_size=3).held_out()
    assert list(held) == ["greedy", "sampled"]
    assert [r.settings.greedy for r in held["greedy"].rollouts] == [True] * 3
    assert tokens(held["greedy"]) != tokens(held["sampled"])
    assert all(r.settings.edit == "random" for r in held["sampled"].rollouts)


def test_no_noise_is_shared_with_training(make_trainer, whole):
    _, experience = make_trainer().step(0)
    assert not {r.key for r in experience.rollouts} & {r.key for r in whole.rollouts}
