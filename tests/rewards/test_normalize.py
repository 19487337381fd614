"""Normalisation inside groups against the golden advantages and closed forms."""

import json
from pathlib import Path

import pytest
import torch

from tests.tables import each
from unidiff.rewards.normalize import (
    EPSILON,
    correlation,
    group_statistics,
    normalize_groups,
    rank_groups,
    rescale,
    weighted_sum,
)
from unidiff.rewards.router import RewardRouter
from unidiff.rewards.table import RewardTable

CASES = json.loads((Path(__file__).parent.parent / "data" / "losses.json").read_text())["advantages"]
NAN = float("nan")


def tensor(rows):
    return torch.tensor([[NAN if x is None else x for x in row] for row in rows])


def whole_responses(assignment, rewards_BF, weights, groups_B, scale="group"):
    """What the router makes of rewards on responses of one text."""
    rows, count = rewards_BF.shape
    table = RewardTable(
        names=tuple(f"r{f}" for f in range(count)),
        weights=tuple(weights),
        on=("sequence",) * count,
        credit=(("text",),) * count,
        values_BSF=torch.full((rows, 1, count), NAN),
        sequence_BF=rewards_BF,
        modality_BS=torch.zeros(rows, 1, dtype=torch.int64),
    )
    return RewardRouter(assignment, scale=scale).route(table, groups_B)


@each("case", CASES)
def test_golden_advantages(case):
    rewards_BF, weights_F = tensor(case["rewards"]), torch.tensor(case["weights"])
    groups_B = torch.arange(len(rewards_BF)) // case["num_generations"]
    near = {"atol": 2e-4, "rtol": 0, "equal_nan": True}
    total_B, std_B, expected_B = (tensor([case[k]])[0] for k in ("total_rewards", "std_rewards", "advantages"))
    assignment = "joint" if case["aggregation"] == "sum_then_normalize" else "normalize_then_sum"
    routed = whole_responses(assignment, rewards_BF, case["weights"], groups_B, case["scale_rewards"])
    torch.testing.assert_close(routed.advantage_BS[:, 0], expected_B, **near)
    torch.testing.assert_close(routed.account.total_BS[:, 0].float(), total_B, **near)
    by_batch = assignment == "joint" and case["scale_rewards"] == "batch"
    found_B = routed.account.divisor_BS[:, 0] - EPSILON if by_batch else routed.account.std_BS[:, 0]
    torch.testing.assert_close(found_B.float(), std_B, **near)
    if assignment == "joint":
        alone_B = normalize_groups(weighted_sum(rewards_BF, weights_F), groups_B, scale=case["scale_rewards"])
        torch.testing.assert_close(alone_B.float(), expected_B, **near)


def test_missing_values_are_left_out_of_mean_and_std():
    values = torch.tensor([1.0, 3.0, NAN, 5.0, NAN, 7.0])
    groups = torch.tensor([4, 4, 4, -9, -9, 4])  # any ids, in any order
    full = torch.tensor([1.0, 3.0, 7.0])
    expected = (full - full.mean()) / (full.std() + 1e-4)
    advantage = normalize_groups(values, groups).float()
    torch.testing.assert_close(advantage[[0, 1, 5]], expected)
    assert advantage[[2, 3, 4]].tolist() == [0, 0, 0]
    assert group_statistics(values, groups).comparable_N.tolist() == [True, True, False, False, False, True]


@each("scale", ["group", "batch", "none"])
def test_a_constant_group_gives_exactly_zero(scale):
    values = torch.cat([torch.full((7,), 0.1), torch.tensor([1.0, 2.0])])
    groups = torch.tensor([0] * 7 + [1] * 2)
    advantage = normalize_groups(values, groups, scale=scale)
    assert (advantage[:7] == 0).all() and (advantage[7:] != 0).all()
    assert group_statistics(values, groups).std_G[0] == 0


def test_leave_one_out_baseline():
    values, groups = torch.tensor([1.0, 2.0, 6.0, NAN]), torch.zeros(4, dtype=torch.long)
    advantage = normalize_groups(values, groups, scale="none", leave_one_out=True)
    torch.testing.assert_close(advantage.float(), torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, 0]))


def test_batch_scale_divides_by_the_pool():
    values = torch.tensor([0.0, 1.0, 0.0, 9.0])
    groups = torch.tensor([0, 0, 1, 1])
    batch = normalize_groups(values, groups, scale="batch")
    torch.testing.assert_close(batch[1].item(), 0.5 / (values.std().item() + 1e-4))
    pooled = normalize_groups(values, groups, scale="batch", pools_N=torch.tensor([5, 5, 6, 6]))
    torch.testing.assert_close(pooled, normalize_groups(values, groups, scale="group"))


def test_shift_and_order_invariance():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, generator=generator)
    groups = torch.arange(40) % 5
    order = torch.randperm(40, generator=generator)
    base = normalize_groups(values, groups)
    torch.testing.assert_close(normalize_groups(values[order], groups[order]), base[order])
    torch.testing.assert_close(normalize_groups(values + groups * 10.0, groups), base, atol=1e-5, rtol=0)


def test_correlation():
    x = torch.tensor([1.0, 2.0, 4.0])
    assert correlation(x, -2 * x) == pytest.approx(-1.0)
    assert correlation(x, torch.ones(3)) is None and correlation(x[:1], x[:1]) is None


def test_ranks_are_what_a_value_beats_less_what_beats_it():
    values = torch.tensor([3.0, 9.0, 3.0, -5.0, NAN, 2.0, 100.0])
    groups = torch.tensor([4, 4, 4, 4, 4, 7, -2])
    ranks = rank_groups(values, groups)
    torch.testing.assert_close(ranks[:4].float(), torch.tensor([0.0, 1.0, 0.0, -1.0]))
    assert ranks[4].isnan() and ranks[5:].tolist() == [0, 0]  # missing, and alone in their groups
    torch.testing.assert_close(rank_groups(values.exp(), groups), ranks, equal_nan=True)  # order is all that counts


def test_a_scale_of_its_own_keeps_missing_values_missing():
    values, groups = torch.tensor([1.0, 3.0, NAN, 8.0, 9.0]), torch.tensor([0, 0, 0, 1, 1])
    assert torch.equal(rescale(values, groups, None)[:2], values[:2].double())
    for scale in ("group", "batch", "none", "rank"):
        scaled = rescale(values, groups, scale)
        assert scaled.isnan().tolist() == [False, False, True, False, False]
        assert scaled[:2].sum().item() == pytest.approx(0) and scaled[0] < 0 < scaled[1]


def test_unknown_scale_is_named():
    with pytest.raises(ValueError, match="scale='std'"):
        normalize_groups(torch.ones(2), torch.zeros(2, dtype=torch.long), scale="std")  # pyright: ignore
