"""The puzzles: rules against an independent search, words that name what changes, pictures that are read back, and
responses that deserve nothing."""

from __future__ import annotations

import itertools
import random
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tables import each
from unidiff.rewards.segment_view import SegmentView, link_row
from unidiff.rewards.table import reward_table
from unidiff.sequence import Modality
from unidiff.tasks import Example
from unidiff.tasks.cells import named_cells
from unidiff.tasks.jigsaw import Jigsaw, JigsawGame
from unidiff.tasks.maze import Maze, MazeGame
from unidiff.tasks.puzzles import Game, Puzzle
from unidiff.tasks.puzzles.judge import REWARDS
from unidiff.tasks.sliding_puzzle import SlidingGame, SlidingPuzzle
from unidiff.tasks.sokoban import Sokoban, SokobanGame

PUZZLES: dict[str, Puzzle] = {
    "maze": Maze(),
    "maze of 3": Maze(size=3, difficulty=(2, 3)),
    "maze of 6": Maze(size=6, difficulty=(4, 8)),
    "sokoban": Sokoban(),
    "two boxes": Sokoban(boxes=2, size=5, walls=3, difficulty=(4, 6)),
    "numerals": SlidingPuzzle(faces="numerals"),
    "pieces": SlidingPuzzle(faces="picture"),
    "sliding 2 x 2": SlidingPuzzle(size=2, difficulty=(2, 3)),
    "jigsaw": Jigsaw(),
    "jigsaw of 2": Jigsaw(size=2, difficulty=(1, 2)),
}
every_puzzle = pytest.mark.parametrize("task", PUZZLES.values(), ids=list(PUZZLES))


def game_of(example: Example) -> Any:
    return example.columns["game"]


def walked(game: Game, chance: random.Random, steps: int) -> Any:
    """A state some random legal moves from the start."""
    state = game.start
    for _ in range(steps):
        state = chance.choice(list(game.moves(state).values()) or [state])
    return state


def searched(game: Game, state: Any) -> int:
    """Moves to the end, by a search that knows nothing but `moves` and `solved`."""
    frontier, seen = deque([(state, 0)]), {state}
    while frontier:
        state, steps = frontier.popleft()
        if game.solved(state):
            return steps
        for after in game.moves(state).values():
            if after not in seen:
                seen.add(after)
                frontier.append((after, steps + 1))
    raise AssertionError("no solution")


def response(example: Example, *parts: Any, ended: bool = True) -> tuple[SegmentView, ...]:
    views = [
        SegmentView(modality=Modality.TEXT, tokens=torch.zeros(1), text=p, ended=ended or i + 1 < len(parts))
        if isinstance(p, str)
        else SegmentView(modality=Modality.IMAGE, tokens=torch.zeros(1), pixels=np.asarray(p))
        for i, p in enumerate(parts)
    ]
    return link_row(views, columns=dict(example.columns))


def values(example: Example, *parts: Any, **options: Any) -> dict[str, list[float]]:
    """What each reward says of the segments that it applies to, in order."""
    table = reward_table(REWARDS, [response(example, *parts, **options)])
    assert not [one for one in table.missing.values() if one.cause != "none"]
    return {name: table.present(f).tolist() for f, name in enumerate(table.names)}


# ---------------------------------------------------------------- examples


@every_puzzle
def test_examples_are_deterministic_and_as_hard_as_asked(task: Puzzle) -> None:
    for index in range(6):
        example, again = task.example("train", index), task.example("train", index)
        assert repr(example.columns) == repr(again.columns)
        assert example.prompt[0] == again.prompt[0] and example.prompt[1].tobytes() == again.prompt[1].tobytes()
        assert task.demonstration(example)[::2] == task.demonstration(again)[::2]
        game = game_of(example)
        found = searched(game, game.start) if task.size**2 < 9 or not isinstance(game, JigsawGame) else None
        assert example.columns["distance"] == game.distance(game.start) and found in (None, game.distance(game.start))
        assert task.difficulty[0] <= example.columns["distance"] <= task.difficulty[1]


@every_puzzle
def test_no_board_is_in_two_splits(task: Puzzle) -> None:
    found = {split: {repr(game_of(task.example(split, i))) for i in range(40)} for split in ("train", "dev", "test")}
    for one, other in itertools.combinations(found.values(), 2):
        assert not one & other


@every_puzzle
def test_a_shortest_solution_earns_everything(task: Puzzle) -> None:
    for index in range(4):
        example = task.example("test", index)
        parts = task.best(example)
        assert len(parts) == 2 * example.columns["distance"] + 1
        assert all(set(found) == {1.0} for found in values(example, *parts).values())
        figures = task.measure([response(example, *parts)], [example])
        assert {name: float(v[0]) for name, v in figures.items()} == dict.fromkeys(figures, 1.0)
        assert set(figures) == set(task.headline)


@every_puzzle
def test_demonstrations_are_legal_and_agree(task: Puzzle) -> None:
    for index in range(8):
        example = task.example("train", index)
        *rounds, answer = task.demonstration(example, attempt=1)
        found = values(example, *rounds, answer)
        assert set(found["legal_move"]) == set(found["picture_exact"]) == {1.0}
        assert found["agreement"] == found["answer_format"] == [1.0]


@every_puzzle
def test_the_walkers_success_is_the_mean_of_demonstrations(task: Puzzle) -> None:
    example = task.example("test", 3)
    expected, greedy = task.walker_success(example)
    solved = [task.demonstration(example, attempt)[-1] for attempt in range(300)]
    game = game_of(example)
    mean = np.mean([game.solved(game.carry_out(game.parse_answer(answer))) for answer in solved])
    assert mean == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 300) ** 0.5 + 1e-9)
    assert 0 <= greedy <= 1


# ---------------------------------------------------------------- words and pictures


@every_puzzle
def test_a_move_names_every_cell_that_it_changes(task: Puzzle) -> None:
    chance = random.Random(0)
    for index in range(10):
        game = game_of(task.example("train", index))
        state = walked(game, chance, index % 4)
        for text, after in game.moves(state).items():
            assert game.form.fullmatch(text) and game.short.fullmatch(game.shorten(text))
            changed = {tuple(cell) for cell in np.argwhere(game.classes(state) != game.classes(after)).tolist()}
            assert changed <= set(named_cells(text, task.size))
            before, later = (np.asarray(task.picture(game, s), int) for s in (state, after))
            tokens = (before != later).any(-1).reshape(8, 8, 8, 8).any((1, 3))
            assert not (tokens & ~task.region(text, (8, 8))).any()


@every_puzzle
def test_pictures_are_read_back(task: Puzzle) -> None:
    chance = random.Random(1)
    for index in range(10):
        game = game_of(task.example("dev", index))
        state = walked(game, chance, index)
        picture = task.picture(game, state)
        assert picture.size == (64, 64) and (task.read(game, picture) == game.classes(state)).all()
        noisy = np.asarray(picture, int) + np.random.default_rng(index).integers(-20, 21, (64, 64, 3))
        again = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        assert (task.read(game, again) == game.classes(state)).all()
    assert len(np.unique(game.tiles(task.frame.tile).reshape(len(game.tiles(task.frame.tile)), -1), axis=0)) >= 4


@each(("size", "tile", "margin"), [(2, 32, 0), (3, 16, 8), (4, 16, 0), (5, 8, 8), (6, 8, 8)])
def test_frames(size: int, tile: int, margin: int) -> None:
    frame = replace(Maze(), size=size).frame if size > 2 else Jigsaw(size=2, difficulty=(1, 2)).frame
    assert (frame.tile, frame.margin) == (tile, margin)
    named = frame.region([(0, 0), (size - 1, size - 1)], (8, 8))
    assert named.sum() == 2 * (tile // 8) ** 2 and named[margin // 8, margin // 8]
    with pytest.raises(ValueError, match="expected 8 x 8 tokens, got 4 x 8"):
        frame.region([], (4, 8))


# ---------------------------------------------------------------- the rules of each


def test_walls_of_a_maze() -> None:
    #  a1 | a2        the way from a1 to a2 leads through b1 and b2
    opened = frozenset({((0, 0), (1, 0)), ((1, 0), (1, 1)), ((0, 1), (1, 1))})
    game = MazeGame(2, opened, (0, 0), (0, 1))
    assert game.moves((0, 0)) == {"from a1 go down to b1": (1, 0)}
    assert game.distance((0, 0)) == 3 and game.moves((0, 1)) == {}
    assert game.solved(game.carry_out(["down", "right", "up"]))
    assert not game.solved(game.carry_out(["right"])) and game.carry_out(["down", "up"]) == (0, 0)


def test_pushes() -> None:
    # a1 worker, a2 box, a3 target, b2 wall
    game = SokobanGame(3, frozenset({(1, 1)}), frozenset({(0, 2)}), ((0, 0), frozenset({(0, 1)})))
    push = "from a1 push a2 right to a3"
    assert set(game.moves(game.start)) == {push, "from a1 go down to b1"}
    assert game.solved(game.moves(game.start)[push]) and game.pushes == 1 and game.distance(game.start) == 1
    assert game.shorten(push) == "right" and game.shorten("from a1 go down to b1") == "down"
    cornered = ((1, 0), frozenset({(2, 0)}))  # a box in a corner that is not a target
    assert game.distance(cornered) == float("inf")
    blocked = SokobanGame(3, frozenset(), frozenset({(2, 2)}), ((0, 0), frozenset({(0, 1)})))
    assert "from a1 push a2 right to a3" in blocked.moves(blocked.start)
    assert not any("push" in text for text in blocked.moves(((0, 1), frozenset({(0, 2)}))))  # the edge is a wall


def test_least_pushes_of_two_boxes() -> None:
    task = PUZZLES["two boxes"]
    for index in range(5):
        example = task.example("train", index)
        pushes = sum("push" in part for part in task.best(example) if isinstance(part, str))
        assert 1 <= example.columns["pushes"] <= pushes


def test_sliding() -> None:
    game = SlidingGame(3, (1, 2, 3, 4, 0, 5, 6, 7, 8), (1, 1))
    assert game.solved(game.start) and game.moves(game.start) == {}
    moved = (1, 2, 3, 0, 4, 5, 6, 7, 8)
    assert game.moves(moved)["slide b2 left to b1"] == game.start and game.distance(moved) == 1
    assert set(game.moves(moved)) == {"slide b2 left to b1", "slide a1 down to b1", "slide c1 up to b1"}


def test_swaps() -> None:
    game = JigsawGame(2, (1, 2, 0, 3), "red disc")
    assert game.distance(game.start) == 2 and searched(game, game.start) == 2 and len(game.moves(game.start)) == 6
    assert game.solved(game.carry_out(["a1 a2", "a2 b1"])) is (game.carry_out(["a1 a2", "a2 b1"]) == (0, 1, 2, 3))
    assert (
        game.parse_answer("answer a1 a2 b1 b2") == ("a1 a2", "b1 b2") and game.parse_answer("answer a1 a2 b1") is None
    )


# ---------------------------------------------------------------- what deserves nothing


@every_puzzle
@each("text", ["", "go", "{move} ", " {move}", "{move} {move}", "{MOVE}", "please {move}", "answer"])
def test_malformed_moves_earn_nothing(task: Puzzle, text: str) -> None:
    example = task.example("test", 0)
    move = task.best(example)[0]
    bad = text.format(move=move, MOVE=str(move).upper())
    found = values(example, bad, example.prompt[1], "answer nothing")
    assert found["legal_move"] == found["progress"] == [0.0]
    assert found["picture_cells"] == found["picture_exact"] == [0.0]  # of a copy, too
    assert found["success"] == found["agreement"] == found["answer_format"] == [0.0]


@every_puzzle
def test_illegal_moves_change_nothing(task: Puzzle) -> None:
    example = task.example("test", 1)
    game = game_of(example)
    legal = set(game.moves(game.start))
    other = game_of(task.example("test", 2))
    wrong = [t for s in (other.start, walked(other, random.Random(2), 2)) for t in other.moves(s) if t not in legal]
    if not wrong:  # every swap is legal, and there are few moves of 2 x 2 tiles
        assert isinstance(game, JigsawGame) or task.size == 2
        return
    found = values(example, wrong[0], example.prompt[1], game.answer_text([wrong[0]]))
    assert found["legal_move"] == found["progress"] == [0.0] and found["picture_exact"] == [1.0]
    assert found["success"] == [0.0] and found["answer_format"] == [1.0]


@every_puzzle
def test_answers(task: Puzzle) -> None:
    example = task.example("test", 4)
    *rounds, answer = task.best(example)
    unsolved = " ".join(answer.split()[: -len(game_of(example).shorten(rounds[-2]).split())])
    for said, expected in ((answer + " ", 0.0), (answer.upper(), 0.0), ("answer", 0.0), (unsolved, 0.0), (answer, 1.0)):
        assert values(example, *rounds, said)["success"] == [expected]
    assert values(example, *rounds, answer, ended=False)["success"] == [0.0]
    alone = values(example, answer)  # right, but no round says so
    assert alone["success"] == [1.0] and alone["agreement"] == [0.0] and "legal_move" in alone


@every_puzzle
def test_pictures_of_another_state_are_not_exact(task: Puzzle) -> None:
    example = task.example("test", 5)
    move, right, *_ = task.best(example)
    assert values(example, move, right, "answer")["picture_exact"] == [1.0]
    assert values(example, move, example.prompt[1], "answer")["picture_exact"] == [0.0]  # nothing was done
    both = np.minimum(np.asarray(right), np.asarray(example.prompt[1]))  # two markers, two boxes, two gaps
    assert values(example, move, both, "answer")["picture_exact"] == [0.0]
    assert values(example, move, np.zeros((64, 64, 3), np.uint8), "answer")["picture_exact"] == [0.0]


def test_two_workers_are_not_exact() -> None:
    task = PUZZLES["sokoban"]
    example = task.example("test", 0)
    game = game_of(example)
    move, *_ = task.best(example)
    after = game.moves(game.start)[move]
    classes = game.classes(after)
    free = next(tuple(cell) for cell in np.argwhere(classes == 0).tolist())
    classes[free] = 2
    frame = task.frame
    assert values(example, move, frame.draw(game.tiles(frame.tile)[classes]), "answer")["picture_exact"] == [0.0]


# ---------------------------------------------------------------- settings


@each(
    ("make", "message"),
    [
        (lambda: Maze(size=7), "size: expected 3 to 6 cells, got 7"),
        (lambda: Jigsaw(size=4), "size: expected 2 to 3 cells, got 4"),
        (lambda: Maze(difficulty=(4, 3)), "difficulty: expected the least and the most"),
        (lambda: Maze(rounds=0), "rounds: expected 1 or more"),
        (lambda: Maze(goal_directed=1.5), "goal_directed: expected a probability"),
        (lambda: Sokoban(boxes=3), "boxes: expected 1 or 2, got 3"),
        (lambda: Sokoban(walls=9), "walls: expected 0 to 8 for size 4, got 9"),
        (lambda: SlidingPuzzle(difficulty=(3, 9)), "distances are known to 14 moves"),
        (lambda: SlidingPuzzle(faces="photo"), "faces"),  # type: ignore[arg-type]
        (lambda: Maze(side=32, size=5), "a picture of 32 pixels has 4 tokens a side, too few for 5 cells"),
        (
            lambda: Maze(difficulty=(15, 15), size=3).example("train", 0),
            "no board of size 3 has a solution of 15 moves",
        ),
        (lambda: Maze().example("all", 0), "split: expected one of train, dev, test"),
    ],
)
def test_settings_that_do_not_fit(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
