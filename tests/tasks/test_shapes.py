"""Shapes: every prompt has scenes that show it, pictures are read back, and one wrong attribute is rejected."""

from __future__ import annotations

import dataclasses
import random

import pytest
from PIL import Image

from tests.tables import each
from unidiff.tasks.shapes.edits import ACTIONS, draw_edit, progress, reached
from unidiff.tasks.shapes.look import look
from unidiff.tasks.shapes.prompts import TAGS, all_rows, relations, scene_for
from unidiff.tasks.shapes.scene import COLOURS, KINDS, SIDE, SIZE, Shape, apart, draw
from unidiff.tasks.shapes.verify import soft, strict


def rows(tag: str, count: int = 40) -> list[dict]:
    return random.Random(tag).choices(all_rows(tag), k=count)


@pytest.mark.parametrize("tag", TAGS)
def test_a_scene_of_a_row_shows_it_and_is_read_back(tag):
    chance, given = random.Random(1), rows(tag)
    scenes = [scene_for(row, chance) for row in given]
    seen = look([draw(scene) for scene in scenes])
    assert [sorted((s.kind, s.colour, s.left, s.top) for s in each) for each in seen] == [
        sorted((s.kind, s.colour, s.left, s.top) for s in read_boxes(scene)) for scene in scenes
    ]
    assert all(strict(row, each) and soft(row, each) == 1.0 for row, each in zip(given, seen))


def read_boxes(scene: tuple[Shape, ...]) -> list:
    """What `look` sees of each shape when it is alone."""
    return [look([draw((shape,))])[0][0] for shape in scene]


def wrong(scene: tuple[Shape, ...], row: dict, how: str, chance: random.Random) -> tuple[Shape, ...] | None:
    """A scene with one attribute that a row asks for changed; None where the row does not ask for it."""
    at = chance.randrange(len(scene))
    shape, others = scene[at], (*scene[:at], *scene[at + 1 :])
    part = next(part for part in row["include"] if part["class"] == shape.kind)
    if how == "kind":
        return (*others, dataclasses.replace(shape, kind=chance.choice([k for k in KINDS if k != shape.kind])))
    if how == "colour":
        colour = chance.choice([c for c in COLOURS if c != shape.colour])
        return (*others, dataclasses.replace(shape, colour=colour)) if "color" in part else None
    if how == "one less":
        return others
    if how == "mirrored":
        if row["tag"] != "position":
            return None
        flipped = [dataclasses.replace(s, x=SIDE - SIZE - s.x, y=SIDE - SIZE - s.y) for s in scene]
        return tuple(flipped)
    free = [(x, y) for x in range(1, 50, 8) for y in range(1, 50, 8) if all(apart((x, y), (s.x, s.y)) for s in scene)]
    return (*scene, Shape(chance.choice(KINDS), chance.choice(list(COLOURS)), *chance.choice(free))) if free else None


@pytest.mark.parametrize("how", ["kind", "colour", "one less", "one more", "mirrored"])
def test_one_wrong_attribute_is_rejected(how):
    chance, tried = random.Random(how), 0
    for row in (row for tag in TAGS for row in rows(tag, 25)):
        scene = wrong(scene_for(row, chance), row, how, chance)
        if scene is not None:
            (seen,) = look([draw(scene)])
            assert not strict(row, seen) and soft(row, seen) < 1.0, (row["prompt"], seen)
            tried += 1
    assert tried >= 25


def test_prompts_say_what_rows_ask_for():
    said = {row["prompt"] for tag in TAGS for row in all_rows(tag)}
    assert len(said) == sum(len(all_rows(tag)) for tag in TAGS) == 825  # none twice
    for prompt in (
        "a photo of three blue circles",
        "a photo of a circle below a triangle",
        "a photo of a green square",
    ):
        assert prompt in said
    with pytest.raises(ValueError, match=r"tag: expected one of single_object, .* got 'two'"):
        all_rows("two")


@each(
    ("offset", "held"),
    [((-20, 0), {"left of"}), ((20, -20), {"right of", "above"}), ((0, 30), {"below"}), ((2, -2), set())],
)
def test_relations(offset, held):
    assert relations(offset, 2 * SIZE) == held


@pytest.mark.parametrize("action", ACTIONS)
def test_an_edit_is_reached_by_its_target_alone(action):
    chance = random.Random(action)
    edits = [draw_edit(chance, action) for _ in range(30)]
    done, undone = look([draw(e.target) for e in edits]), look([draw(e.scene) for e in edits])
    assert all(reached(e, seen) and progress(e, seen) == 1.0 for e, seen in zip(edits, done))
    assert not any(reached(e, seen) for e, seen in zip(edits, undone))
    assert all(progress(e, seen) == 0.0 for e, seen in zip(edits, undone))
    assert all(progress(e, []) == (0.0 if action == "remove" else -0.5) for e in edits)  # the other shapes are lost
    assert all(str(e.before) in e.instruction for e in edits)


def test_pictures_that_cannot_be_read_are_named():
    for picture in (Image.new("RGB", (SIDE, SIDE + 1)), Image.new("L", (SIDE, SIDE))):
        with pytest.raises(ValueError, match=rf"expected RGB pictures of {SIDE} x {SIDE} pixels, got"):
            look([picture])
    assert look([]) == [] and look([Image.new("RGB", (SIDE, SIDE), "white")]) == [[]]
    for bad, word in (({"kind": "star"}, "kind"), ({"colour": "pink"}, "colour"), ({"x": 60}, "x, y")):
        with pytest.raises(ValueError, match=f"^{word}"):
            Shape(**{"kind": "circle", "colour": "red", "x": 0, "y": 0, **bad})
