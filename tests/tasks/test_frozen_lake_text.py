"""FrozenLake without pictures: demonstrations, judges, and a model that is trained on them."""

import math

import numpy as np
import pytest
import torch

from tests.tables import each
from unidiff import GRPOConfig, GRPOTrainer, supervised
from unidiff.families import native
from unidiff.rewards.segment_view import SegmentView, link_row
from unidiff.rewards.table import reward_table
from unidiff.sequence import Modality
from unidiff.tasks import FrozenLake
from unidiff.tasks.frozen_lake.board import Board
from unidiff.tasks.frozen_lake.rewards import REWARDS
from unidiff.tasks.frozen_lake.rewards import measure as measure_interleaved
from unidiff.tasks.frozen_lake.text import measure

TASK, SAME = FrozenLake(pictures=False), FrozenLake()
# The start is a1, holes are b2 and d1, the goal is c3.
BOARD = Board(("SFFF", "FHFF", "FFGF", "HFFF"))
WALK = "from a1 go right to a2 from a2 go right to a3 from a3 go down to b3 from b3 go down to c3"
ANSWER = " answer right right down down"


def row(text: str, ended: bool = True):
    view = SegmentView(modality=Modality.TEXT, tokens=torch.zeros(1), text=text, ended=ended)
    return link_row([view], columns={"board": BOARD})


def rewards(text: str, **options) -> dict[str, float]:
    table = reward_table(TASK.rewards(), [row(text, **options)])
    assert not table.missing
    return {name.removesuffix("_in_text"): table.present(f).item() for f, name in enumerate(table.names)}


def figures(text: str, **options) -> dict[str, float]:
    return {k: float(v[0]) for k, v in measure([row(text, **options)], [BOARD]).items()}


def test_a_demonstration_is_the_texts_of_the_interleaved_one():
    for index in range(20):
        example = TASK.example("train", index)
        (text,) = TASK.demonstration(example, attempt=index % 3)
        texts = [p for p in SAME.demonstration(SAME.example("train", index), attempt=index % 3) if isinstance(p, str)]
        assert text == " ".join(texts)
        found = measure(
            [link_row([SegmentView(modality=Modality.TEXT, tokens=torch.zeros(1), text=text)])], [example.board]
        )
        assert found["format"] == found["agreement"] == found["legal"] == 1


def test_rewards_are_those_of_the_interleaved_texts_under_names_of_their_own():
    given = {r.name: r.weight for r in REWARDS if r.on == "text"}
    assert {r.name.removesuffix("_in_text"): r.weight for r in TASK.rewards()} == given
    assert all(r.name not in given for r in TASK.rewards())


@each(
    ("text", "expected"),
    [
        (WALK + ANSWER, [1, 1, 1, 1, 1]),
        (WALK + " answer right down", [1, 1, 0, 0, 1]),
        (WALK, [1, 1, 0, 0, 0]),  # the last sentence stands where the answer belongs
        ("from a1 go right to a2 from a2 go down to b2 answer right down", [0.5, 0.5, 0, 1, 1]),  # into a hole
        ("from a1 go down to b1 from b1 go up to a1" + ANSWER, [1, 0.5, 1, 0, 1]),
        ("go right" + " " + WALK + ANSWER, [0.8, 0.8, 1, 0, 1]),
        ("answer right right down down", [0, 0, 1, 0, 1]),
        ("from from answer", [0, 0, 0, 0, 0]),
        ("", [0, 0, 0, 0, 0]),
    ],
)
def test_rewards_and_figures_of_solutions(text, expected):
    names = ("legal_move", "progress", "success", "agreement", "answer_format")
    assert rewards(text) == pytest.approx(dict(zip(names, expected)))
    found = figures(text)
    assert found["success"] == expected[2] and found["agreement"] == expected[3]
    assert found["legal"] == pytest.approx(expected[0]) or text == WALK
    assert math.isnan(found["image_exact"])


def test_a_solution_that_was_cut_off_earns_no_answer():
    found = rewards(WALK + ANSWER, ended=False)
    assert found["success"] == found["agreement"] == found["answer_format"] == 0 and found["legal_move"] == 1
    assert figures(WALK + ANSWER, ended=False)["success"] == 0


def test_figures_are_those_of_the_interleaved_texts():
    parts = [*WALK.replace(" from", "|from").split("|"), ANSWER.strip()]
    views = [SegmentView(modality=Modality.TEXT, tokens=torch.zeros(1), text=p) for p in parts]
    expected = measure_interleaved([link_row(views)], [BOARD])
    for name, value in measure([row(WALK + ANSWER)], [BOARD]).items():
        assert np.array_equal(value, expected[name], equal_nan=True)


def test_a_text_model_trains_on_demonstrations_and_by_reward(tokenizer, images, tmp_path):
    model = native.build(tokenizer, images, d_model=32, layers=1, heads=2, d_mlp=48, text_length=32)
    rows = supervised.corpus(model, TASK, range(6))
    assert all(len(r.response) == 1 for r in rows)
    settings = supervised.SupervisedConfig(batch_size=4, window_batch=4)
    for step in range(4):
        canvas, mask = supervised.batch(model, supervised.Corpus(rows), settings, step)
        losses = supervised.supervised_loss(model, canvas, mask, settings.changed_weight)
        assert losses["text"] > 0 and losses["image"] == 0
    config = GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, num_prompts=2, num_generations=2, text_estimator="elbo", text_steps=4,
        text_threshold=None, max_rounds=1, eval_size=2, quiet=True, save_steps=0, image_steps=1,
    )  # fmt: skip
    trainer = GRPOTrainer(model, TASK, config)
    (metrics,) = trainer.train()
    assert all(math.isfinite(v) for v in metrics.values()) and metrics["tokens/text"] >= 0


def test_a_board_in_letters():
    task = FrozenLake(pictures=False, board="text")
    example = task.example("test", 3)
    (text,) = example.prompt
    assert example.board == TASK.example("test", 3).board
    rows = [line.split()[1:] for line in text.splitlines()[2:6]]
    assert tuple("".join(row) for row in rows) == example.board.rows
    assert text.splitlines()[1].split() == ["1", "2", "3", "4"] and "answer right down" in text
    with_pictures = ({"board": "text"}, "board: expected 'picture', or 'text' with pictures False")
    for wrong, message in (
        with_pictures,
        ({"board": "words", "pictures": False}, "board is 'words'; choose one of picture, text"),
    ):
        with pytest.raises(ValueError, match=message):
            FrozenLake(**wrong)
