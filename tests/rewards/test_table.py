"""The reward table: where values stand, how it reads, and joining tables of several processes."""

import numpy as np
import pytest
import torch

from unidiff.rewards.reward import Cause, reward
from unidiff.rewards.segment_view import SegmentView, link_row
from unidiff.rewards.table import RewardTable, evaluate
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
    return [1.0, float("inf"), 3.0][: len(segments)]


def test_values_stand_at_what_they_score():
    ragged = [*rows(2), link_row([picture()], task=5), ()]
    table = evaluate([legal, follows], ragged)
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
    page = str(evaluate([legal, follows, solved], rows()))
    assert page.splitlines()[0] == "RewardTable(3 rows, 3 segments, rewards: legal, follows, solved)"
    lines = [line.split() for line in page.splitlines()[1:]]
    assert lines[0] == ["reward", "on", "weight", "credit", "scored", "mean", "std", "lost"]
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
    assert repr(evaluate([legal], [])) == "RewardTable(0 rows, 0 segments, rewards: legal)"


def test_explains_in_words():
    table = evaluate([legal, follows, solved], rows())
    assert table.explain(2, 1) == (
        "Sample 2, segment 1 (image):\n"
        "  follows = 2, times weight 2 = 4\n"
        "  whole response: solved = 3, times weight -0.5 = -1.5; credited to text and image"
    )
    words = table.explain(1, 0)
    assert "legal has no value (none: returned None: not applicable)" in words
    assert "solved has no value (not_finite: returned inf" in words
    assert "no reward looks at image segments" in evaluate([legal], rows()).explain(0, 1)
    with pytest.raises(IndexError, match="sample 0 has no sampled segment 9"):
        table.explain(0, 9)


def test_concatenate_is_the_table_of_all_rows():
    everything = [*rows(2), link_row([text("x"), picture(), text("y"), picture(), text("z")], task=1)]
    whole = evaluate([legal, follows], everything)
    parts = [evaluate([legal, follows], everything[:1]), evaluate([legal, follows], everything[1:])]
    joined = RewardTable.concatenate(parts)
    for name in ("values_BSF", "sequence_BF", "modality_BS"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name), equal_nan=True)
    assert joined.losses == whole.losses and joined.lost == whole.lost
    with pytest.raises(ValueError, match="different rewards"):
        RewardTable.concatenate([whole, evaluate([legal], rows())])


def test_disagreeing_shapes_are_named():
    nothing = torch.zeros(2, 3, 1), torch.zeros(2, 2), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="disagree"):
        RewardTable(("a",), (1.0,), ("text",), (("text",),), *nothing)
    with pytest.raises(ValueError, match="1 entries each"):
        RewardTable((), (), (), (), nothing[0], torch.zeros(2, 1), nothing[2])
