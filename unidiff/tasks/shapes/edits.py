"""Edits of a picture by instruction: the instruction, the scene before and the scene after."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from unidiff.tasks.shapes.look import Seen
from unidiff.tasks.shapes.prompts import free_places
from unidiff.tasks.shapes.scene import COLOURS, KINDS, SIDE, SIZE, Shape, apart

ACTIONS = ("recolour", "reshape", "move", "remove")
STEP = 16  # pixels that "move" moves a shape: two tokens of the native tokenizer
_WAYS = {"left": (-STEP, 0), "right": (STEP, 0), "up": (0, -STEP), "down": (0, STEP)}
_NEAR = 3  # tolerance of a shape's centre in pixels


@dataclass(frozen=True)
class Edit:
    """One edit: the shape `before` becomes `after`; None = it is removed."""

    instruction: str
    action: str
    scene: tuple[Shape, ...]
    before: Shape
    after: Shape | None

    @property
    def target(self) -> tuple[Shape, ...]:
        """The scene that the instruction asks for."""
        changed = [self.after if shape == self.before else shape for shape in self.scene]
        return tuple(shape for shape in changed if shape is not None)


def draw_edit(chance: random.Random, action: str) -> Edit:
    """A scene of two or three shapes with different names, and an edit of one of them."""
    if action not in ACTIONS:
        raise ValueError(f"action: expected one of {', '.join(ACTIONS)}, got {action!r}")
    while True:
        names = chance.sample([(kind, colour) for kind in KINDS for colour in COLOURS], chance.choice((2, 3)))
        scene = tuple(Shape(*name, *place) for name, place in zip(names, free_places(len(names), chance)))
        before, *rest = chance.sample(scene, len(scene))
        found = _change(action, before, rest, chance)
        if found is not None:
            instruction, after = found
            return Edit(instruction, action, scene, before, after)


def _change(action: str, shape: Shape, rest: Sequence[Shape], chance: random.Random) -> tuple[str, Shape | None] | None:
    """An instruction and the changed shape (None = removed). Returns None if the shape cannot be moved."""
    if action == "remove":
        return f"remove the {shape}", None
    if action == "recolour":
        colour = chance.choice([name for name in COLOURS if name != shape.colour])
        return f"make the {shape} {colour}", replace(shape, colour=colour)
    if action == "reshape":
        kind = chance.choice([name for name in KINDS if name != shape.kind])
        return f"turn the {shape} into a {kind}", replace(shape, kind=kind)
    ways = {way: (shape.x + x, shape.y + y) for way, (x, y) in _WAYS.items()}
    free = [
        way
        for way, (x, y) in ways.items()
        if min(x, y) >= 0 and max(x, y) <= SIDE - SIZE and all(apart((x, y), (s.x, s.y)) for s in rest)
    ]
    if not free:
        return None
    way = chance.choice(free)
    return f"move the {shape} {way}", replace(shape, x=ways[way][0], y=ways[way][1])


def other(edit: Edit, chance: random.Random) -> Edit:
    """A different edit of the same scene: the same action on another shape, or another edit of the same shape."""
    while True:
        same = chance.random() < 0.5
        before = chance.choice([shape for shape in edit.scene if shape != edit.before]) if same else edit.before
        action = edit.action if same else chance.choice(ACTIONS)
        found = _change(action, before, [shape for shape in edit.scene if shape != before], chance)
        if found is not None and (before, found[1]) != (edit.before, edit.after):
            return Edit(found[0], action, edit.scene, before, found[1])


def shows(shape: Shape, seen: Seen) -> bool:
    """Whether a seen shape matches this one in kind, colour and place."""
    x, y = seen.centre
    middle = SIZE / 2
    near = abs(x - shape.x - middle) <= _NEAR and abs(y - shape.y - middle) <= _NEAR
    return seen.clear and near and (seen.kind, seen.colour) == (shape.kind, shape.colour)


def reached(edit: Edit, seen: Sequence[Seen]) -> bool:
    """Whether a picture shows the target and nothing else."""
    return len(seen) == len(edit.target) and all(any(shows(shape, one) for one in seen) for shape in edit.target)


def progress(edit: Edit, seen: Sequence[Seen]) -> float:
    """How far an edit has got: 1 for the target, 0 for the unchanged picture, down to -1 for a worse one.

    Half a point if the old shape is gone and half if the new one is there (a removal: one point for the old one), minus
    the share of other shapes that are lost, minus a quarter for each unexpected shape.
    """
    after = () if edit.after is None else (edit.after,)
    rest = [shape for shape in edit.scene if shape != edit.before]
    still, *there = (any(shows(shape, one) for one in seen) for shape in (edit.before, *after))
    done = sum((not still, *there)) / (1 + len(after))
    lost = sum(not any(shows(shape, one) for one in seen) for shape in rest) / len(rest)
    extra = sum(not any(shows(shape, one) for shape in (*edit.scene, *after)) for one in seen)
    return max(-1.0, done - lost - extra / 4)
