"""Functions in the style of TRL's GRPOTrainer documentation, taken as they are."""

import asyncio
import functools
import re

import numpy as np
import pytest
import torch

from unidiff.rewards.names import as_reward, as_rewards
from unidiff.rewards.reward import Cause, Reward
from unidiff.rewards.table import RewardTable, reward_table
from unidiff.rewards.trl import from_trl


def longer_is_better(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def starts_with_a(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^a\d", content) else 0.0 for content in contents]


def only_even(prompts, completions, answer, **kwargs):
    return [1.0 if a == 0 else None if a % 2 else 0.5 for a in answer]


async def remote(prompts, completions, **kwargs):
    await asyncio.sleep(0.01)
    return [1.0 if completion else 0.0 for completion in completions]


def curriculum(completions, trainer_state, **kwargs):
    assert trainer_state.max_steps == 100 and trainer_state.epoch == 0
    return [float(trainer_state.global_step)] * len(completions)


def logs(completions, answer, log_extra=None, log_metric=None, **kwargs):
    found = [re.search(r"b(\d)", c) for c in completions]
    rewards = [1.0 if m and int(m[1]) == a else 0.0 for m, a in zip(found, answer)]
    if log_extra:
        log_extra("golden_answer", list(answer))
        log_extra("extracted_answer", [m[1] if m else "[none]" for m in found])
    if log_metric:
        log_metric("accuracy", sum(rewards) / len(rewards))
        log_metric("accuracy", torch.tensor(0.0))
        log_metric("never a number", float("nan"))
    return rewards


class Penalty:
    """A callable object with a name, as TRL's own repetition penalty."""

    __name__ = "penalty"

    def __call__(self, completion_ids, **kwargs):
        return [-float(len(ids) - len(set(ids))) for ids in completion_ids]


def test_functions_of_the_documentation(responses):
    from transformers import TrainerState

    rewards = [
        longer_is_better,
        from_trl(starts_with_a, chat=True),
        only_even,
        remote,
        from_trl(curriculum, scale="rank", weight=0.5, credit="both"),
        logs,
        Penalty(),
    ]
    table = reward_table(rewards, responses(), TrainerState(global_step=7, max_steps=100, epoch=0.0))
    assert table.lost == {("only_even", Cause.NONE): 1}, table.messages
    assert table.on == ("sequence",) * 7 and table.names[-1] == "penalty"
    expected = [[10, 1, 1, 1, 7, 1, -4], [10, 1, float("nan"), 1, 7, 1, -4], [10, 1, 0.5, 1, 7, 1, -4]]
    np.testing.assert_allclose(table.sequence_BF, expected)
    assert table.credit[4] == ("text", "image") and table.scale[4] == "rank" and table.weights[4] == 0.5
    assert table.metrics == {"accuracy": 0.5}
    assert table.extra["golden_answer"] == {(0, -1): 0, (1, -1): 1, (2, -1): 2}
    assert "  extracted_answer: 2" in table.explain(2, 0).splitlines()


def test_what_is_asked_for_is_given_and_no_more(responses):
    given = {}

    def everything(**kwargs):
        given.update(kwargs)
        return [0.0] * len(kwargs["completions"])

    def without_kwargs(completions):
        return [0.0] * len(completions)

    assert not reward_table([from_trl(everything), without_kwargs], responses()).lost
    names = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
    assert given.keys() == names | {"answer", "board"}
    assert given["prompts"] == ["q"] * 3 and given["completions"] == ["a0\nb0", "a1\nb1", "a2\nb2"]
    assert given["completion_ids"][0] == [0, 1, *range(6), 0, 1] and given["answer"] == [0, 1, 2]


def test_chat(responses):
    def chat(prompts, completions):
        assert prompts[1] == [{"role": "user", "content": "q"}]
        return [float(c == [{"role": "assistant", "content": f"a{i}\nb{i}"}]) for i, c in enumerate(completions)]

    assert reward_table([from_trl(chat, chat=True)], responses()).sequence_BF.tolist() == [[1.0]] * 3


def test_an_absent_column_is_named(responses):
    def wants(completions, solution):
        return []

    table = reward_table([wants], responses())
    assert "asks for the column 'solution'" in table.messages["wants", Cause.RAISED]


def test_log_extra_of_another_length_is_a_fault(responses):
    def wrong(completions, log_extra, **kwargs):
        log_extra("column", [1])
        return [1.0] * len(completions)

    table = reward_table([wrong], responses())
    assert table.lost == {("wrong", Cause.RAISED): 3} and not table.extra
    assert "log_extra('column'): got 1 values for 3 segments" in table.messages["wrong", Cause.RAISED]


def test_native_rewards_may_log_too(responses):
    from unidiff import reward

    @reward
    def words(segments, log_metric, log_extra, **columns):
        assert columns.keys() == {"answer", "board"}  # only what is named
        log_metric("words", len(segments))
        log_extra("upper", [s.text.upper() for s in segments])
        return [1.0] * len(segments)

    tables = [reward_table([words], responses(n)) for n in (1, 2)]
    joined = RewardTable.concatenate(tables)
    assert joined.metrics == {"words": 3.0} and joined.extra["upper"][2, 2] == "B1"
    assert joined.rows(slice(1, 3)).extra["upper"] == tables[1].extra["upper"]


def test_functions_are_recognised(responses):
    scaled = functools.partial(longer_is_better, scale=2.0)
    assert from_trl(scaled).name == as_reward(scaled).name == "longer_is_better"
    assert isinstance(as_reward(longer_is_better), Reward)
    assert [one.asynchronous for one in as_rewards([remote, only_even])] == [True, False]
    with pytest.raises(TypeError, match="mark the function"):
        as_reward(lambda texts: [])
