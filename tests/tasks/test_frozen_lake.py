"""FrozenLake: dynamics against gymnasium, the demonstrator, pictures, sentences and every verifier."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv

from tests.tables import each
from unidiff.tasks import FrozenLake
from unidiff.tasks.cells import DIRECTIONS, cell_at, cell_name, named_cells
from unidiff.tasks.frozen_lake.board import (
    CLASSES,
    Board,
    Move,
    board_after,
    board_classes,
    judge_answer,
    parse_answer,
    parse_move,
    region,
    replay,
)
from unidiff.tasks.frozen_lake.render import draw
from unidiff.tasks.frozen_lake.task import SPLITS, layout_bucket, render

#         1234
# a       SFFF
# b       FHFH
# c       FFFF
# d       HFFG
BOARD = Board(("SFFF", "FHFH", "FFFF", "HFFG"))


def _pixels(image) -> np.ndarray:
    return np.asarray(image)[None]


# --- boards ---------------------------------------------------------------------------------------


@each("size", [3, 4, 8])
def test_dynamics_are_gymnasiums(size):
    board = FrozenLake(size=size).example("train", 0).board
    transitions = FrozenLakeEnv(desc=list(board.rows), is_slippery=False).P
    for state in range(size * size):
        for action, direction in enumerate(DIRECTIONS):
            [(_, target, reward, _)] = transitions[state][action]
            cell, fell = board.step(divmod(state, size), direction)
            assert cell == divmod(int(target), size)
            assert fell == (board.rows[cell[0]][cell[1]] == "H")
            if board.letter(divmod(state, size)) != "G":
                assert (cell == board.goal) == bool(reward)


def test_geometry_of_a_board():
    assert (BOARD.size, BOARD.start, BOARD.goal) == (4, (0, 0), (3, 3))
    assert BOARD.holes == {(1, 1), (1, 3), (3, 0)}
    assert BOARD.distance((3, 3)) == 0
    assert BOARD.distance((0, 3)) == 5  # around the hole at b4
    assert BOARD.distance((1, 1)) == math.inf
    cut_off = Board(("SHF", "HFF", "FFG"))
    assert cut_off.distance(cut_off.start) == math.inf


def test_cell_names():
    assert [cell_name(cell) for cell in ((0, 0), (1, 1), (1, 2), (2, 1))] == ["a1", "b2", "b3", "c2"]
    assert all(cell_at(cell_name((r, c))) == (r, c) for r in range(8) for c in range(8))
    with pytest.raises(ValueError, match="name: 'i1'"):
        cell_at("i1")


@each("rows", [("SF", "FG"), ("SFF", "FFG"), ("SFF", "FFX", "FFG"), ("SFF", "FSF", "FFG"), ("SFF", "FFF", "FFF")])
def test_board_refuses_what_is_no_map(rows):
    with pytest.raises(ValueError, match="rows: expected"):
        Board(rows)


# --- examples -------------------------------------------------------------------------------------


def test_examples_obey_the_settings():
    task = FrozenLake(size=5, min_distance=3, max_distance=6)
    distances = set()
    for index in range(60):
        example = task.example("train", index)
        assert example.board.size == 5
        distances.add(example.board.distance(example.board.start))
        assert example.columns["distance"] == example.board.distance(example.board.start)
    assert distances == {3, 4, 5, 6}


def test_splits_share_no_layout():
    task = FrozenLake(size=3, min_distance=1, max_distance=2)  # few layouts, so an overlap would show
    layouts = {
        split: {"".join(task.example(split, i).board.rows).translate(str.maketrans("SG", "FF")) for i in range(80)}
        for split in SPLITS
    }
    assert all(layouts.values())
    assert not layouts["train"] & layouts["dev"]
    assert not layouts["train"] & layouts["test"]
    assert not layouts["dev"] & layouts["test"]


def test_bucket_ignores_start_and_goal():
    assert layout_bucket(("SFH", "FFF", "FFG")) == layout_bucket(("FGH", "FFF", "SFF"))


def test_examples_and_demonstrations_are_deterministic():
    first, second = FrozenLake(), FrozenLake()
    for split in SPLITS:
        one, other = first.example(split, 7), second.example(split, 7)
        assert one.board == other.board
        assert _parts(first.demonstration(one, 3)) == _parts(second.demonstration(other, 3))
    examples = [first.example("train", index) for index in range(20)]
    assert len({example.board for example in examples}) > 10
    answers = [{first.demonstration(example, attempt)[-1] for attempt in range(4)} for example in examples]
    assert sum(map(len, answers)) > 30


def _parts(demonstration) -> list:
    return [part if isinstance(part, str) else part.tobytes() for part in demonstration]


def test_global_random_state_is_left_alone():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    task = FrozenLake()
    task.demonstration(task.example("dev", 5))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


# --- the demonstrator -----------------------------------------------------------------------------


def test_demonstrations_are_legal_and_agree_with_their_pictures():
    task = FrozenLake()
    successes = 0
    for index in range(60):
        example = task.example("train", index)
        *rounds, answer = task.demonstration(example)
        texts, pictures = rounds[::2], rounds[1::2]
        assert 1 <= len(texts) == len(pictures) <= task.rounds
        result = replay(example.board, texts)
        assert all(result.well_formed) and all(result.legal) and not result.fell
        for count, picture in enumerate(pictures, start=1):
            assert (task.parse(_pixels(picture))[0] == board_after(example.board, texts[:count])).all()
        verdict = judge_answer(example.board, texts, answer)
        assert verdict["agreement"] and verdict["format"] and verdict["success"] == result.reached
        assert result.reached or len(texts) == task.rounds
        successes += result.reached
    assert 0 < successes < 60


def test_a_walker_that_always_aims_reaches_the_goal():
    task = FrozenLake(goal_directed=1.0)
    example = task.example("train", 3)
    assert task.walker_success(example) == pytest.approx((1.0, 1.0))
    assert len(task.demonstration(example)) == 2 * example.columns["distance"] + 1


def test_walker_success_is_the_mean_of_demonstrations():
    task = FrozenLake()
    example = task.example("train", 1)
    reached = [
        judge_answer(example.board, [], task.demonstration(example, attempt)[-1])["success"] for attempt in range(300)
    ]
    sampled, greedy = task.walker_success(example)
    assert np.mean(reached) == pytest.approx(sampled, abs=0.1)
    assert 0 <= greedy <= 1


def test_walker_probabilities():
    task = FrozenLake(goal_directed=0.4)
    at_start = task.walker_probabilities(BOARD, (0, 0), None)  # down and right are safe, and both are best
    np.testing.assert_allclose(at_start, [0, 0.5, 0.5, 0])
    straight = task.walker_probabilities(BOARD, (0, 2), "right")  # best: down; straight on: a4
    np.testing.assert_allclose(straight, [0, 0.4, 0.6, 0])
    for index in range(20):
        board = task.example("dev", index).board
        chances = task.walker_probabilities(board, board.start, None)
        assert chances.sum() == pytest.approx(1)
        assert all(not p or board.safe(board.neighbour(board.start, d)) for d, p in zip(DIRECTIONS, chances))


# --- pictures -------------------------------------------------------------------------------------


@each(("size", "tile"), [(4, 16), (3, 8), (8, 16)])
def test_every_picture_is_read_back(size, tile):
    task = FrozenLake(size=size, tile=tile)
    rng = np.random.default_rng(0)
    classes = rng.integers(CLASSES, size=(100, size, size))  # any class at any place
    pixels = draw(classes, tile)
    assert pixels.shape == (100, size * tile, size * tile, 3)
    assert (task.parse(pixels) == classes).all()
    noisy = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
    assert (task.parse(noisy) == classes).mean() > 0.99


def test_picture_shows_board_and_agent():
    image = render(BOARD, (1, 1))
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert (FrozenLake().parse(_pixels(image))[0] == board_classes(BOARD, (1, 1))).all()
    assert (board_classes(BOARD, None) == BOARD.classes).all()
    assert board_classes(BOARD, (1, 1))[1, 1] == 3  # a hole with the agent in it


def test_few_distinct_patches():
    classes = np.arange(CLASSES).repeat(16).reshape(CLASSES, 4, 4)
    patches = draw(classes).reshape(CLASSES, 8, 8, 8, 8, 3).swapaxes(2, 3).reshape(-1, 192)
    assert len(np.unique(patches, axis=0)) <= 100


@each("shape", [(1, 32, 32, 3), (1, 64, 64, 4), (64, 64, 3), (1, 3, 64, 64)])
def test_parse_refuses_other_pictures(shape):
    with pytest.raises(ValueError, match=r"pixels: expected uint8 \[N, 64, 64, 3\]"):
        FrozenLake().parse(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="float64"):
        FrozenLake().parse(np.zeros((1, 64, 64, 3)))


# --- sentences ------------------------------------------------------------------------------------

MALFORMED_MOVES = [
    "",
    "from b2 go right",
    "from b2 go right to",
    "from b2 go right to b3 b3",
    "from b2 go right to b9",
    "from b2  go right to b3",
    " from b2 go right to b3",
    "from b2 go right to b3\n",
    "From b2 go right to b3",
    "from b2 go east to b3",
    "go right",
]


def test_parse_move():
    assert parse_move("from b2 go right to b3") == Move((1, 1), "right", (1, 2))
    assert [parse_move(text) for text in MALFORMED_MOVES] == [None] * len(MALFORMED_MOVES)


def test_parse_answer():
    assert parse_answer("answer right right down") == ("right", "right", "down")
    for text in (
        "",
        "answer",
        "answer ",
        "right down",
        "answer right  down",
        "answer rightdown",
        "answer right b2",
    ):
        assert parse_answer(text) is None


def test_named_cells():
    assert named_cells("from b2 go right to b3", 4) == [(1, 1), (1, 2)]
    assert named_cells("c4 go go b2 b2 h8 a9 xb1 go", 4) == [(2, 3), (1, 1)]
    assert named_cells("go right", 4) == []


def test_region_covers_the_named_cells():
    mask = region("from a1 go right to a2", 4, (8, 8))
    expected = np.zeros((8, 8), bool)
    expected[:2, :4] = True
    assert (mask == expected).all()
    assert (FrozenLake().region("from a1 go right to a2", (4, 4)) == expected[::2, ::2]).all()
    assert not region("nothing named", 4, (8, 8)).any()
    for grid in ((6, 8), (2, 2), (0, 4)):
        with pytest.raises(ValueError, match="grid: "):
            region("from a1 go right to a2", 4, grid)


# --- verifiers ------------------------------------------------------------------------------------

WAY = ["from a1 go down to b1", "from b1 go down to c1", "from c1 go right to c2", "from c2 go down to d2"]
END = ["from d2 go right to d3", "from d3 go right to d4"]


def test_replay_of_a_good_walk():
    result = replay(BOARD, WAY + END)
    assert result.cells == ((1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (3, 3))
    assert result.well_formed == result.legal == result.progressed == (True,) * 6
    assert result.reached and not result.fell and result.agent == BOARD.goal


def test_replay_of_nothing():
    result = replay(BOARD, [])
    assert (result.cells, result.agent, result.fell, result.reached) == ((), BOARD.start, False, False)


@each("text", MALFORMED_MOVES)
def test_a_malformed_text_moves_and_earns_nothing(text):
    result = replay(BOARD, [text, WAY[0]])
    assert result.cells == ((0, 0), (1, 0))
    assert (result.well_formed, result.legal, result.progressed) == ((False, True),) * 3


@each(
    ("text", "agent"),
    [
        ("from a2 go down to b2", (1, 0)),  # the agent is not at a2
        ("from a1 go down to b2", (1, 0)),  # down leads to b1
        ("from a1 go up to a1", (0, 0)),  # off the board
        ("from a1 go left to a1", (0, 0)),
        ("from h8 go right to a2", (0, 1)),  # a cell that this board does not have
    ],
)
def test_an_untrue_text_is_carried_out_but_illegal(text, agent):
    result = replay(BOARD, [text])
    assert (result.well_formed, result.legal, result.progressed) == ((True,), (False,), (False,))
    assert result.agent == agent


def test_a_move_away_is_legal_but_no_progress():
    result = replay(BOARD, [*WAY[:1], "from b1 go up to a1"])
    assert result.legal == (True, True)
    assert result.progressed == (True, False)


def test_nothing_moves_after_a_fall():
    result = replay(BOARD, [WAY[0], "from b1 go right to b2", "from b2 go right to b3"])
    assert result.cells == ((1, 0), (1, 1), (1, 1))
    assert result.legal == (True, False, False)
    assert result.fell and not result.reached


def test_nothing_moves_after_the_goal():
    result = replay(BOARD, [*WAY, *END, "from d4 go left to d3"])
    assert result.agent == BOARD.goal and result.reached
    assert result.legal[-1] is False and result.progressed[-1] is False


def test_judge_answer():
    judged = judge_answer(BOARD, WAY + END, "answer down down right down right right")
    assert judged == {"success": True, "agreement": True, "format": True}
    judged = judge_answer(BOARD, WAY, "answer down down right down")
    assert judged == {"success": False, "agreement": True, "format": True}
    judged = judge_answer(BOARD, WAY, "answer right right down down right down")
    assert judged == {"success": True, "agreement": False, "format": True}
    through_a_hole = judge_answer(BOARD, [], "answer down right right down down right")
    assert through_a_hole["success"] is False


@each(
    ("texts", "answer"),
    itertools.product([[], ["go down"], [*WAY[:1], "go down"]], ["", "answer", "answer down", "go down"]),
)
def test_malformed_parts_never_agree(texts, answer):
    assert judge_answer(BOARD, texts, answer)["agreement"] is False


@each("answer", ["", "answer", "down down right down right right"])
def test_a_malformed_answer_earns_nothing(answer):
    assert not any(judge_answer(BOARD, WAY + END, answer).values())


def test_board_after():
    assert (board_after(BOARD, WAY[:2]) == board_classes(BOARD, (2, 0))).all()
    assert (board_after(BOARD, ["nonsense"]) == board_classes(BOARD, BOARD.start)).all()


# --- errors ---------------------------------------------------------------------------------------


@each(
    ("settings", "field"),
    [
        ({"size": 2}, "size"),
        ({"size": 9}, "size"),
        ({"frozen_probability": 1.0}, "frozen_probability"),
        ({"min_distance": 5, "max_distance": 4}, "min_distance"),
        ({"min_distance": 0}, "min_distance"),
        ({"size": 3, "max_distance": 5}, "max_distance"),
        ({"max_rounds": 0}, "max_rounds"),
        ({"goal_directed": 1.5}, "goal_directed"),
        ({"tile": 12}, "tile"),
    ],
)
def test_settings_out_of_range(settings, field):
    with pytest.raises(ValueError, match=field):
        FrozenLake(**settings)


def test_unknown_places():
    task = FrozenLake()
    with pytest.raises(ValueError, match="split: expected one of train, dev, test, got 'valid'"):
        task.example("valid", 0)
    with pytest.raises(ValueError, match="index"):
        task.example("train", -1)
    with pytest.raises(ValueError, match="attempt"):
        task.demonstration(task.example("train", 0), attempt=-1)
