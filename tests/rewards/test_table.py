"""The reward table: where values stand, how it reads, and joining tables of several processes."""

import copy
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.tables import each
from unidiff.rewards.reward import Cause, reward
from unidiff.rewards.routed import Routed
from unidiff.rewards.router import ASSIGNMENTS, RewardRouter
from unidiff.rewards.segment_view import SegmentView, link_row
from unidiff.rewards.table import WHOLE, RewardTable, reward_table
from unidiff.sequence import Modality


def text(content):
    return SegmentView(modality=Modality.TEXT, tokens=torch.arange(3), text=content)


def picture():
    return SegmentView(modality=Modality.IMAGE, tokens=torch.arange(6), pixels=np.zeros((4, 6, 3), np.uint8))


def rows(count=3):
    return [link_row([text("a"), picture(), text("b")], task=i) for i in range(count)]


@reward(on="text")
def legal(segments):
    return [float(s.index) if s.task != 1 else None for s in segments]


@reward(on="image", weight=2.0)
def follows(segments):
    return [float(s.task) for s in segments]


@reward(on="sequence", credit="both", weight=-0.5)
def solved(segments):
    return [1.0, float("inf"), 3.0, 4.0, 9.0, -2.0][: len(segments)]


def test_values_stand_at_what_they_score():
    ragged = [*rows(2), link_row([picture()], task=5), ()]
    table = reward_table([legal, follows], ragged)
    assert table.modality_BS.tolist() == [[0, 1, 0], [0, 1, 0], [1, -1, -1], [-1, -1, -1]]
    assert table.values_BSF.dtype == torch.float32
    expected = torch.full((4, 3, 2), float("nan"))
    expected[0, 0, 0], expected[0, 2, 0] = 0, 2
    expected[0, 1, 1], expected[1, 1, 1], expected[2, 0, 1] = 0, 1, 5
    torch.testing.assert_close(table.values_BSF, expected, equal_nan=True)
    assert table.lost == {("legal", Cause.NONE): 2}
    assert table.asked_F.tolist() == [4, 3]
    means = torch.tensor([[1.0, 0.0], [float("nan"), 1.0], [float("nan"), 5.0], [float("nan")] * 2])
    torch.testing.assert_close(table.row_means_BF.float(), means, equal_nan=True)


def test_reads_as_a_table():
    page = str(reward_table([legal, follows, solved], rows()))
    assert page.splitlines()[0] == "RewardTable(3 rows, 3 segments, rewards: legal, follows, solved)"
    lines = [line.split() for line in page.splitlines()[1:]]
    assert lines[0] == ["reward", "on", "weight", "credit", "scored", "mean", "std", "missing"]
    assert lines[1] == ["legal", "text", "1", "text", "4/6", "1.0000", "1.1547", "none", "2"]
    assert lines[3] == [
        "solved",
        "sequence",
        "-0.5",
        "text+image",
        "2/3",
        "2.0000",
        "1.4142",
        "not_finite",
        "1",
    ]
    assert repr(reward_table([legal], [])) == "RewardTable(0 rows, 0 segments, rewards: legal)"


def test_explains_in_words():
    table = reward_table([legal, follows, solved], rows())
    assert table.explain(2, 1) == (
        "Sample 2, segment 1 (image):\n"
        "  follows = 2, times weight 2 = 4\n"
        "  whole response: solved = 3, times weight -0.5 = -1.5; credited to text and image"
    )
    words = table.explain(1, 0)
    assert "legal has no value (none: returned None: not applicable)" in words
    assert "solved has no value (not_finite: returned inf" in words
    assert "no reward looks at image segments" in reward_table([legal], rows()).explain(0, 1)
    with pytest.raises(IndexError, match="sample 0 has no sampled segment 9"):
        table.explain(0, 9)


def test_explains_how_the_router_came_to_an_advantage():
    table = reward_table([legal, follows, solved], rows(4))
    assert "advantage" not in table.explain(2, 1)
    routed = RewardRouter("factorized").route(table, torch.tensor([0, 0, 0, 0]))
    assert table.explain(2, 1, routed).splitlines()[-3:] == [
        "  factorized (sum of the row's means, of its modality alone): 2 × 2 (follows) + -0.5 × 3 (solved) = 2.5",
        "  compared in group 0 with 4 values: mean 2, std 1.871",  # of -0.5, 2, 2.5 and 4
        "  advantage of each of its sampled tokens: (2.5 - 2) / 1.871 = 0.2672",
    ]
    routed = RewardRouter("segment", scale="none", leave_one_out=True).route(table, torch.tensor([5, 5, 5, 5]))
    lines = table.explain(0, 2, routed).splitlines()
    assert lines[1] == "  legal = 2, times weight 1 = 2"
    assert lines[-3].endswith("own values): 1 × 2 (legal) + -0.5 × 1 (solved) = 1.5")
    assert lines[-2:] == [
        "  compared in group 0 with 3 values: mean 0.6667, std 0.7638",  # of 1.5, 0.5 and 0
        "  advantage of each of its sampled tokens: 3/2 × (1.5 - 0.6667) = 1.25",
    ]
    same = reward_table([reward(lambda segments: [1.0] * len(segments), on="image", name="same")], rows())
    routed = RewardRouter("joint").route(same, torch.tensor([0, 0, 0]))
    assert same.explain(1, 1, routed).endswith("sampled tokens: all are equal = 0")
    routed = RewardRouter("segment").route(table, torch.tensor([0, 0, 1, 1]))
    assert table.explain(1, 0, routed).splitlines()[-1] == (
        "  no advantage: nothing to compare it with; its tokens are not trained"
    )
    mine = RewardRouter(lambda values, segments: torch.full((4, 3), 0.25))
    routed = mine.route(table, torch.tensor([0, 0, 1, 1]))
    assert table.explain(1, 0, routed).endswith("tokens: a function of yours gave it 0.25 = 0.25")


@each(
    ("assignment", "scale", "leave_one_out"), itertools.product(ASSIGNMENTS, ("group", "batch", "none"), (False, True))
)
def test_the_account_of_an_advantage_is_right(assignment, scale, leave_one_out):
    table = reward_table([legal, replace(follows, scale="rank"), solved], rows(6))
    routed = RewardRouter(assignment, scale, leave_one_out).route(table, torch.tensor([0, 0, 0, 1, 1, 1]))
    account, weights = routed.account, torch.tensor(table.weights).double()
    assert account is not None and routed.valid_BS.sum() > 9
    present = ~account.terms_BSF.isnan()
    total = torch.where(present, account.terms_BSF * weights, 0.0).sum(-1)
    torch.testing.assert_close(account.total_BS, total.masked_fill(~present.any(-1), float("nan")), equal_nan=True)
    advantage = (account.total_BS - account.mean_BS) / account.divisor_BS
    if leave_one_out and assignment != "normalize_then_sum":
        advantage = advantage * account.count_BS / (account.count_BS - 1)
    expected = torch.where(routed.valid_BS & (account.std_BS > 0), advantage, 0.0)
    torch.testing.assert_close(routed.advantage_BS, expected.float())
    for row in range(6):
        for segment in range(3):
            last = table.explain(row, segment, routed).splitlines()[-1]
            valid, value = routed.valid_BS[row, segment], routed.advantage_BS[row, segment]
            assert last.endswith(f" = {value:.4g}") if valid else "not trained" in last


def test_a_table_can_be_kept():
    table = reward_table([legal, replace(follows, scale="rank"), solved], rows(4))
    table.extra = {"note": {(0, 1): "a", (3, WHOLE): 2.5, (1, 0): [1, 2]}}
    table.logged = {"accuracy": [0.5, 1.0]}
    tensors, header = table.to_tensors()
    others = tensors | {"tokens": torch.ones(3)}  # beside those of a file of rollouts
    kept = RewardTable.from_tensors(others, json.loads(json.dumps(header)))
    for name in ("names", "weights", "on", "credit", "scale", "missing", "lost", "logged", "metrics"):
        assert getattr(kept, name) == getattr(table, name), name
    assert kept.extra["note"] == {(0, 1): "a", (3, WHOLE): 2.5, (1, 0): "[1, 2]"}
    assert str(kept) == str(table)
    for row in range(4):
        assert [kept.explain(row, s) for s in range(3)] == [table.explain(row, s) for s in range(3)]


def test_looking_at_a_table_under_every_assignment_changes_nothing_that_it_explains():
    table = reward_table([legal, replace(follows, scale="rank"), solved], rows(6))
    groups_B = torch.tensor([4, 4, 4, -1, -1, -1])
    before, fields = copy.deepcopy(table), set(vars(table))
    routed = {name: RewardRouter(name).route(table, groups_B) for name in ASSIGNMENTS}
    told = {name: [table.explain(row, s, routed[name]) for row in range(6) for s in range(3)] for name in routed}
    assert all(f"  {name} (" in line for name, lines in told.items() for line in lines)
    for name in reversed(ASSIGNMENTS):  # whatever was looked at in between
        again = RewardRouter(name).route(table, groups_B)
        assert [table.explain(row, s, again) for row in range(6) for s in range(3)] == told[name]
        assert torch.equal(again.advantage_BS, routed[name].advantage_BS)
        assert routed[name].group_B.tolist() == [1, 1, 1, 0, 0, 0]
    assert set(vars(table)) == fields and table.missing == before.missing and "advantage" not in table.explain(0, 0)
    for name in ("values_BSF", "sequence_BF", "modality_BS"):
        torch.testing.assert_close(getattr(table, name), getattr(before, name), equal_nan=True)


@pytest.mark.parametrize("router", [RewardRouter("segment"), RewardRouter(lambda v, s: torch.ones(v.shape[:2]))])
def test_what_a_router_made_can_be_kept(router):
    table = reward_table([legal, follows, solved], rows(4))
    routed = router.route(table, torch.tensor([0, 0, 1, 1]))
    tensors, header = routed.to_tensors()
    kept = Routed.from_tensors(tensors | table.to_tensors()[0], json.loads(json.dumps(header)))
    for row in range(4):
        assert [table.explain(row, s, kept) for s in range(3)] == [table.explain(row, s, routed) for s in range(3)]


def test_rows_of_a_table_are_the_table_of_the_rows():
    everything = rows(4)
    table = reward_table([legal, follows, solved], everything)
    routed = RewardRouter("factorized").route(table, torch.tensor([0, 0, 1, 1]))
    part, some = table.rows(slice(1, 3)), routed.rows(slice(1, 3))
    whole = [table.explain(row, 1, routed) for row in range(4)]
    alone = reward_table([legal, follows], everything[1:3])
    torch.testing.assert_close(part.values_BSF[..., :2], alone.values_BSF, equal_nan=True)
    assert {k: v for k, v in part.missing.items() if k[0] < 2} == alone.missing
    assert [part.explain(row, 1, some).splitlines()[1:] for row in range(2)] == [w.splitlines()[1:] for w in whole[1:3]]


def test_concatenate_is_the_table_of_all_rows():
    everything = [*rows(2), link_row([text("x"), picture(), text("y"), picture(), text("z")], task=1)]
    whole = reward_table([legal, follows], everything)
    parts = [reward_table([legal, follows], everything[:1]), reward_table([legal, follows], everything[1:])]
    joined = RewardTable.concatenate(parts)
    for name in ("values_BSF", "sequence_BF", "modality_BS"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name), equal_nan=True)
    assert joined.missing == whole.missing and joined.lost == whole.lost
    with pytest.raises(ValueError, match="different rewards"):
        RewardTable.concatenate([whole, reward_table([legal], rows())])


def test_disagreeing_shapes_are_named():
    nothing = torch.zeros(2, 3, 1), torch.zeros(2, 2), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="disagree"):
        RewardTable(("a",), (1.0,), ("text",), (("text",),), *nothing)
    with pytest.raises(ValueError, match="1 entries each"):
        RewardTable((), (), (), (), nothing[0], torch.zeros(2, 1), nothing[2])
