"""Two tasks of coloured shapes: pictures from prompts, and edits of pictures."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from unidiff.config import check_fields
from unidiff.rewards.reward import Reward, reward
from unidiff.tasks.shapes import edits
from unidiff.tasks.shapes.look import Seen, look
from unidiff.tasks.shapes.prompts import RELATIONS, TAGS, Row, all_rows, scene_for, wording
from unidiff.tasks.shapes.scene import COLOURS, KINDS, SIDE, draw
from unidiff.tasks.shapes.verify import soft, strict
from unidiff.tasks.splits import check_place, generator
from unidiff.tasks.task import Example, Responses, Task


def seen_of(views: Sequence[Any]) -> list[list[Seen]]:
    """The shapes of each view's picture."""
    return look([view.image.resize((SIDE, SIDE)) if view.image.size != (SIDE, SIDE) else view.image for view in views])


# ---------------------------------------------------------------- pictures from prompts


@reward(on="image", name="strict")
def shows_all(segments: Sequence[Any], **columns: Any) -> list[float]:
    """1.0 for a picture that shows exactly the request (see `verify.strict`)."""
    return [float(strict(s.columns["row"], seen)) for s, seen in zip(segments, seen_of(segments))]


@reward(on="image", name="soft")
def shows_some(segments: Sequence[Any], **columns: Any) -> list[float]:
    """The degree to which the picture shows the request (see `verify.soft`)."""
    return [soft(s.columns["row"], seen) for s, seen in zip(segments, seen_of(segments))]


@cache
def split_rows(split: str, tag: str) -> tuple[Row, ...]:
    """The rows of a tag in a split: 80 % in train, at least one in each split."""
    rows = all_rows(tag)
    random.Random(tag).shuffle(rows)
    held_out = max(1, len(rows) // 10)
    ends = {"train": (2 * held_out, None), "dev": (0, held_out), "test": (held_out, 2 * held_out)}
    return tuple(rows[slice(*ends[split])])


def spoiled(row: Row, chance: random.Random) -> Row:
    """A row that differs in one property: a kind, a colour, a count or a place."""
    while True:
        other = copy.deepcopy(row)
        part = chance.choice(other["include"])
        what = chance.choice([name for name in ("class", "color", "count", "position") if name in part])
        if what == "count" and row["tag"] != "counting":
            continue
        if what == "position":
            part[what][0] = chance.choice([r for r in RELATIONS if r != part[what][0]])
        else:
            values = {"class": KINDS, "color": tuple(COLOURS), "count": (2, 3, 4)}[what]
            part[what] = chance.choice([value for value in values if value != part[what]])
        classes = [p["class"] for p in other["include"]]
        if len(set(classes)) == len(classes):
            return other | {"prompt": wording(other["include"])}


@dataclass(frozen=True)
class Shapes(Task):
    """Pictures from prompts in GenEval's schema (2310.11513), with its six tags in equal shares.

    skill: probability that a demonstration shows the request; the others differ in one property.
    """

    skill: float = 0.5

    writes = "image"
    prepare = None
    headline = ("success", "soft", *(f"success/{tag}" for tag in TAGS))
    decoding = "sampled"  # greedy decoding of a new picture gives only ground

    def __post_init__(self) -> None:
        check_fields(self)

    def example(self, split: str, index: int) -> Example:
        check_place(split, index)
        rows = split_rows(split, TAGS[index % len(TAGS)])
        row = generator("shapes", split, index).choice(rows)
        columns = {"row": row, "tag": row["tag"], "place": (split, index)}
        return Example([row["prompt"]], columns, title=row["prompt"])

    def rewards(self) -> tuple[Reward, ...]:
        return shows_all, shows_some

    def measure(self, rows: Responses, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        asked = [e.columns["row"] for e in examples]
        seen = seen_of([row[-1] for row in rows])
        right = np.array([strict(row, each) for row, each in zip(asked, seen)], float)
        tags = np.array([row["tag"] for row in asked])
        by_tag = {f"success/{tag}": np.where(tags == tag, right, np.nan) for tag in TAGS}
        return {"success": right, "soft": np.array([soft(row, each) for row, each in zip(asked, seen)]), **by_tag}

    def demonstration(self, example: Example, attempt: int = 0) -> list[Any]:
        chance = generator("shapes demonstration", *example.columns["place"], attempt)
        row = example.columns["row"]
        return [draw(scene_for(row if chance.random() < self.skill else spoiled(row, chance), chance))]

    def best(self, example: Example) -> list[Any]:
        return [draw(scene_for(example.columns["row"], generator("shapes best", *example.columns["place"])))]


# ---------------------------------------------------------------- edits


@reward(on="image")
def target(segments: Sequence[Any], **columns: Any) -> list[float]:
    """How far an edit has got (see `edits.progress`), plus 1 if the target is reached. An unchanged picture earns 0."""
    return [
        edits.progress(s.columns["edit"], seen) + edits.reached(s.columns["edit"], seen)
        for s, seen in zip(segments, seen_of(segments))
    ]


@reward(on="image", weight=0.2)
def locality(segments: Sequence[Any], **columns: Any) -> list[float]:
    """The share of unchanged pixels among those that the edit should not change."""
    return [kept(s.columns["edit"], s.image, s.image_before) for s in segments]


def kept(edit: edits.Edit, picture: Any, before: Any) -> float:
    """See `locality`. A pixel counts as changed if one of its colours moves by more than 32 of 255."""
    asked = np.asarray(draw(edit.scene), int) != np.asarray(draw(edit.target), int)
    rest: Any = np.logical_not(asked.any(-1))
    moved: Any = (np.abs(np.asarray(picture, int) - np.asarray(before, int)) > 32).any(-1)
    return float(1 - moved[rest].mean())


@dataclass(frozen=True)
class EditShapes(Task):
    """Edits of a picture by instruction: recolour, reshape, move or remove one of its shapes.

    skill: probability that a demonstration follows the instruction; the others do the same to another shape, or
    something else to the right shape.
    """

    skill: float = 0.5

    writes = "edit"
    prepare = None
    headline = ("success", "locality", *(f"success/{action}" for action in edits.ACTIONS))

    def __post_init__(self) -> None:
        check_fields(self)

    def example(self, split: str, index: int) -> Example:
        action = edits.ACTIONS[index % len(edits.ACTIONS)]
        edit = edits.draw_edit(generator("edit shapes", split, index), action)
        columns = {"edit": edit, "action": action, "place": (split, index)}
        return Example([draw(edit.scene), edit.instruction], columns, title=edit.instruction)

    def rewards(self) -> tuple[Reward, ...]:
        return target, locality

    def measure(self, rows: Responses, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        asked = [e.columns["edit"] for e in examples]
        views = [row[-1] for row in rows]
        right = np.array([edits.reached(e, seen) for e, seen in zip(asked, seen_of(views))], float)
        actions = np.array([e.action for e in asked])
        by_action = {f"success/{a}": np.where(actions == a, right, np.nan) for a in edits.ACTIONS}
        return {
            "success": right,
            "locality": np.array([kept(e, view.image, view.image_before) for e, view in zip(asked, views)]),
            **by_action,
        }

    def demonstration(self, example: Example, attempt: int = 0) -> list[Any]:
        chance = generator("edit shapes demonstration", *example.columns["place"], attempt)
        edit = example.columns["edit"]
        return [draw((edit if chance.random() < self.skill else edits.other(edit, chance)).target)]

    def best(self, example: Example) -> list[Any]:
        return [draw(example.columns["edit"].target)]
