"""FrozenLake's rewards on hand-written responses, and the held-out figures beside them."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tables import each
from unidiff.grpo.experience import segment_views
from unidiff.rewards.segment_view import SegmentView, link_row
from unidiff.rewards.table import reward_table
from unidiff.sampling.compute import Compute
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.rollout import Rollout, Stop
from unidiff.sequence import Modality
from unidiff.tasks import FrozenLake
from unidiff.tasks.frozen_lake.board import Board
from unidiff.tasks.frozen_lake.rewards import REWARDS, measure
from unidiff.tasks.frozen_lake.task import render

# The start is a1, holes are b2 and d1, the goal is c3: right right down down leads there.
BOARD = Board(("SFFF", "FHFF", "FFGF", "HFFF"))
RIGHT, RIGHT_AGAIN = "from a1 go right to a2", "from a2 go right to a3"
DOWN, DOWN_AGAIN = "from a3 go down to b3", "from b3 go down to c3"
ANSWER = "answer right right down down"


def at(row: int, column: int, board: Board = BOARD) -> np.ndarray:
    """The picture with the agent at a cell."""
    return np.asarray(render(board, (row, column)))


def response(*parts, board: Board = BOARD, ended: bool = True):
    """A row of views from texts and pictures."""
    views = [
        SegmentView(modality=Modality.TEXT, tokens=torch.zeros(1), text=p, ended=ended or i + 1 < len(parts))
        if isinstance(p, str)
        else SegmentView(modality=Modality.IMAGE, tokens=torch.zeros(1), pixels=np.asarray(p))
        for i, p in enumerate(parts)
    ]
    return link_row(views, columns={"board": board})


def values(*parts, **options) -> dict[str, list[float]]:
    """What each reward says of the segments that it applies to, in order."""
    table = reward_table(REWARDS, [response(*parts, **options)])
    assert not [loss for loss in table.missing.values() if loss.cause != "none"]
    return {name: table.present(f).tolist() for f, name in enumerate(table.names)}


def figures(*parts, board: Board = BOARD, **options) -> dict[str, float]:
    """The response's held-out figures."""
    return {k: float(v[0]) for k, v in measure([response(*parts, board=board, **options)], [board]).items()}


WALK = (RIGHT, at(0, 1), RIGHT_AGAIN, at(0, 2), DOWN, at(1, 2), DOWN_AGAIN, at(2, 2), ANSWER)
NOTHING = {"success": [0.0], "agreement": [0.0], "answer_format": [0.0]}


def test_a_right_response_gets_full_marks():
    found = values(*WALK)
    assert found.pop("legal_move") == found.pop("progress") == found.pop("picture_exact") == [1.0] * 4
    assert found.pop("picture_cells") == [1.0] * 4
    assert found == {"success": [1.0], "agreement": [1.0], "answer_format": [1.0]}
    assert set(figures(*WALK).values()) == {1.0}


def test_a_hole_ends_the_game():
    parts = [
        RIGHT,
        at(0, 1),
        "from a2 go down to b2",
        at(1, 1),
        "from b2 go right to b3",
        at(1, 1),
        "answer right down right",
    ]
    found = values(*parts)
    assert found["legal_move"] == found["progress"] == [1.0, 0.0, 0.0]
    assert found["picture_exact"] == [1.0, 1.0, 1.0]  # it shows what the moves lead to: the agent stays in the hole
    assert (found["success"], found["agreement"], found["answer_format"]) == ([0.0], [1.0], [1.0])


def test_a_step_back_is_legal_and_no_progress():
    found = values(RIGHT, at(0, 1), "from a2 go left to a1", at(0, 0), "answer right left")
    assert found["legal_move"] == [1.0, 1.0] and found["progress"] == [1.0, 0.0]
    assert found["picture_exact"] == [1.0, 1.0] and found["success"] == [0.0] and found["agreement"] == [1.0]


@each(
    "text",
    [
        "from a2 go right to a3",  # the agent is not there
        "from a1 go right to b1",  # not where that leads
        "from a1 go up to a1",  # off the board
        "from a1 go left to a1",
    ],
)
def test_words_and_cells_that_disagree_are_not_legal(text):
    found = values(text, at(0, 1), "answer right")
    assert found["legal_move"] == found["progress"] == [0.0]


MALFORMED = ("", "go right", "from a1 go right", "answer right", "from a1 go right to a9", "From a1 go right to a2")
ALMOST = (
    "from a1 go right to a2 .",
    " from a1 go right to a2",
    "from a1  go right to a2",
    "from a1 go right to a2 to a3",
)


@each("text", MALFORMED + ALMOST)
def test_a_malformed_move_earns_nothing_from_anything(text):
    for picture in (at(0, 0), at(0, 1)):  # a copy of the board before, and what may have been meant
        found = values(text, picture, "answer right")
        assert found.pop("answer_format") == [1.0]  # the answer itself is well formed
        assert {name: v for name, v in found.items() if any(v)} == {}
        held = figures(text, picture, "answer right")
        assert {name for name, v in held.items() if v} == set()


def test_a_picture_behind_a_well_formed_text_is_judged_by_all_that_really_happened():
    found = values("go right", at(0, 1), RIGHT, at(0, 1), "answer right")
    assert found["legal_move"] == [0.0, 1.0] and found["picture_exact"] == [0.0, 1.0]
    assert found["agreement"] == [0.0]


@each("answer", ["", "answer", "answer fly", "answer right ", "answer right,down", "right right", RIGHT])
def test_a_malformed_answer_earns_nothing(answer):
    found = values(*WALK[:-1], answer)
    assert {k: found[k] for k in NOTHING} == NOTHING
    held = figures(*WALK[:-1], answer)
    assert held["success"] == held["agreement"] == held["format"] == 0


def test_two_malformed_parts_do_not_agree():
    assert values("fly", at(0, 0), "answer fly")["agreement"] == [0.0]
    assert values("answer right", at(0, 0), "answer right")["agreement"] == [0.0]
    assert values("", at(0, 0), "")["agreement"] == [0.0]
    assert values("answer right")["agreement"] == [0.0]  # nor does an answer to which nothing was said


def test_an_answer_that_was_cut_off_earns_nothing():
    found = values(*WALK, ended=False)
    assert {k: found[k] for k in NOTHING} == NOTHING and found["legal_move"] == [1.0] * 4
    held = figures(*WALK, ended=False)
    assert held["success"] == held["agreement"] == held["format"] == 0 and held["legal"] == held["image_exact"] == 1


def test_a_lucky_answer_succeeds_without_agreement():
    found = values(RIGHT, at(0, 1), ANSWER)
    assert (found["success"], found["agreement"]) == ([1.0], [0.0])
    assert values(RIGHT, at(0, 1), "answer right")["success"] == [0.0]


def test_a_wrong_picture_keeps_its_share_of_cells():
    found = values(RIGHT, at(0, 0), "answer right")  # two of sixteen cells are wrong
    assert found["picture_cells"] == [14 / 16] and found["picture_exact"] == [0.0]
    blank = values(RIGHT, np.zeros((64, 64, 3), np.uint8), "answer right")
    assert blank["picture_cells"][0] < 0.5 and blank["picture_exact"] == [0.0]


def test_a_response_without_pictures():
    found = values(ANSWER)
    assert found["success"] == [1.0] and found["legal_move"] == found["picture_exact"] == []
    held = figures(ANSWER)
    assert held["success"] == held["format"] == 1 and held["legal"] == 0
    assert math.isnan(held["image_exact"]) and math.isnan(held["image_cells"])


def test_a_response_left_at_a_picture_has_no_answer():
    held = figures(RIGHT, at(0, 1))
    assert held["legal"] == held["image_exact"] == 1 and held["success"] == held["agreement"] == held["format"] == 0
    assert values(RIGHT, at(0, 1))["legal_move"] == [1.0]


def test_boards_of_several_sizes_in_one_batch():
    small = Board(("SFF", "FHF", "FFG"))
    rows = [
        response(*WALK),
        response(RIGHT, at(0, 1, small), "answer right", board=small),
        response(RIGHT, at(0, 2), ""),
    ]
    table = reward_table(REWARDS, rows)
    exact = table.values_BSF[..., table.names.index("picture_exact")]
    assert exact[0, 1::2].tolist() == [1.0] * 4 and exact[1, 1] == 1 and exact[2, 1] == 0
    assert measure(rows, [BOARD, small, BOARD])["image_exact"].tolist() == [1.0, 1.0, 0.0]


def test_no_responses_at_all():
    assert {k: v.shape for k, v in measure([], []).items()}.keys() == figures(ANSWER).keys()


# ---------------------------------------------------------------------------------------------- many responses


def mutated(parts: list, rng: np.random.Generator) -> list:
    """Some texts and pictures exchanged for others of the same response, or spoilt."""
    out = list(parts)
    for i, part in enumerate(parts):
        if rng.random() < 0.3:
            others = [p for p in parts if isinstance(p, str) == isinstance(part, str)]
            out[i] = others[rng.integers(len(others))]
        if isinstance(part, str) and rng.random() < 0.1:
            out[i] = out[i] + " down"
    return out


def test_figures_agree_with_rewards():
    task, rng = FrozenLake(), np.random.default_rng(0)
    rows, boards = [], []
    for index in range(60):
        example = task.example("dev", index)
        parts = mutated(task.demonstration(example), rng)
        rows.append(response(*parts, board=example.board, ended=rng.random() < 0.8))
        boards.append(example.board)
    table, held = reward_table(REWARDS, rows), measure(rows, boards)
    means = {name: table.row_means_BF[:, f].numpy() for f, name in enumerate(table.names)}
    for figure, name in {"success": "success", "agreement": "agreement"}.items():
        np.testing.assert_allclose(held[figure], means[name])
    for figure, name in {"legal": "legal_move", "progress": "progress"}.items():
        np.testing.assert_allclose(held[figure], np.nan_to_num(means[name]))
    for figure, name in {"image_exact": "picture_exact", "image_cells": "picture_cells"}.items():
        np.testing.assert_allclose(held[figure], means[name], rtol=1e-6)
    assert (held["format"] <= means["answer_format"]).all()
    for values_B in held.values():
        assert len(np.unique(values_B[~np.isnan(values_B)])) > 1  # the comparison means something


def test_an_expert_gets_full_marks_in_everything():
    task = FrozenLake(goal_directed=1.0)
    examples = [task.example("train", i) for i in range(30)]
    rows = [response(*task.demonstration(e), board=e.board) for e in examples]
    table, held = reward_table(REWARDS, rows), measure(rows, [e.board for e in examples])
    assert all(set(table.present(f).tolist()) == {1.0} for f in range(len(REWARDS)))
    assert all(set(v.tolist()) == {1.0} for v in held.values())


def test_a_wanderer_gets_full_marks_but_for_progress_and_success():
    task = FrozenLake(goal_directed=0.0)
    examples = [task.example("train", i) for i in range(30)]
    held = measure([response(*task.demonstration(e), board=e.board) for e in examples], [e.board for e in examples])
    for name in ("legal", "agreement", "format", "image_exact", "image_cells"):
        assert set(held[name].tolist()) == {1.0}
    assert held["success"].mean() < 0.5 and held["progress"].mean() < 0.8


# ---------------------------------------------------------------------------------------------- through a model


def rollout(model, task, example, parts, stop: Stop) -> Rollout:
    """The rollout in which a model wrote these parts."""
    sequence = model.encode(example.prompt) + model.encode(parts, prompt=False)
    return Rollout(sequence, stop, Compute(), 0, SamplerConfig(edit="full"))


def test_an_expert_gets_full_marks_through_both_tokenizers(model):
    task = FrozenLake(goal_directed=1.0)
    examples = [task.example("test", i) for i in range(8)]
    rollouts = [rollout(model, task, e, task.demonstration(e), Stop.ANSWERED) for e in examples]
    rows = segment_views(model, rollouts, examples)
    table = reward_table(task.rewards(), rows)
    assert not any(loss.cause != "none" for loss in table.missing.values())
    assert all(set(table.present(f).tolist()) == {1.0} for f in range(len(REWARDS)))
    assert all(set(v.tolist()) == {1.0} for v in task.measure(rows, examples).values())


@pytest.mark.parametrize("stop", [Stop.NO_END, Stop.MAX_ROUNDS])
def test_a_rollout_that_did_not_end_has_no_answer(model, stop):
    task = FrozenLake(goal_directed=1.0)
    example = task.example("test", 0)
    rows = segment_views(model, [rollout(model, task, example, task.demonstration(example), stop)], [example])
    table = reward_table(task.rewards(), rows)
    assert [table.present(table.names.index(n)).tolist() for n in NOTHING] == [[0.0]] * 3
    held = task.measure(rows, [example])
    assert held["success"] == held["agreement"] == held["format"] == 0 and held["legal"] == 1


def test_a_picture_of_another_size_loses_the_value(model):
    row = response(RIGHT, Image.new("RGB", (50, 50)), "answer right")
    table = reward_table(REWARDS, [row])
    assert table.lost["picture_exact", "raised"] == 1 and table.lost["picture_cells", "raised"] == 1
