"""Prompts for pictures: rows in GenEval's schema (Ghosh et al., 2310.11513), and scenes that show what they ask for.

A row is {"tag", "include": [{"class", "count", "color"?, "position"?: [relation, index]}], "prompt"}. Six tags.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

from unidiff.tasks.shapes.scene import COLOURS, INSET, KINDS, LATTICE, SIDE, SIZE, Shape, apart

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {1: "a", 2: "two", 3: "three", 4: "four"}
Row = dict[str, Any]


def all_rows(tag: str) -> list[Row]:
    """Every row of a tag, in a fixed order."""
    kinds, colours = KINDS, tuple(COLOURS)
    pairs = [(a, b) for a in kinds for b in kinds if a != b]
    if tag == "single_object":
        parts = [[_part(a)] for a in kinds]
    elif tag == "two_object":
        parts = [[_part(a), _part(b)] for a, b in pairs]
    elif tag == "counting":
        parts = [[_part(a, count=n, color=c)] for a in kinds for c in colours for n in (2, 3, 4)]
    elif tag == "colors":
        parts = [[_part(a, color=c)] for a in kinds for c in colours]
    elif tag == "position":
        parts = [[_part(b), _part(a, position=[how, 0])] for a, b in pairs for how in RELATIONS]
    elif tag == "color_attr":
        parts = [[_part(a, color=c), _part(b, color=d)] for a, b in pairs for c in colours for d in colours if c != d]
    else:
        raise ValueError(f"tag: expected one of {', '.join(TAGS)}, got {tag!r}")
    return [{"tag": tag, "include": include, "prompt": wording(include)} for include in parts]


def _part(kind: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": kind, "count": count, **more}


def wording(include: list[dict[str, Any]]) -> str:
    """The prompt of a row: "a photo of a red circle and a blue square"."""
    names = [
        " ".join(
            [
                COUNTS[part["count"]],
                *([part["color"]] if "color" in part else []),
                _plural(part["class"]) if part["count"] > 1 else part["class"],
            ]
        )
        for part in include
    ]
    placed = next((i for i, part in enumerate(include) if "position" in part), None)
    if placed is None:
        return "a photo of " + " and ".join(names)
    relation, other = include[placed]["position"]
    return f"a photo of {names[placed]} {relation} {names[other]}"


def _plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("s") else "s")


def scene_for(row: Row, chance: random.Random) -> tuple[Shape, ...]:
    """A scene that shows exactly what a row asks for; unspecified colours and places are random."""
    while True:
        groups = [
            [(part["class"], part.get("color") or chance.choice(list(COLOURS)))] * part["count"]
            for part in row["include"]
        ]
        owners = [i for i, group in enumerate(groups) for _ in group]
        places = free_places(len(owners), chance)
        names = itertools.chain(*groups)
        shapes = tuple(Shape(kind, colour, x, y) for (kind, colour), (x, y) in zip(names, places))
        if all(_placed(part, shapes, owners, i) for i, part in enumerate(row["include"])):
            return shapes


def free_places(count: int, chance: random.Random) -> list[tuple[int, int]]:
    """Upper left corners of boxes that do not touch, INSET pixels from multiples of LATTICE."""
    while True:
        places: list[tuple[int, int]] = []
        for _ in range(count):
            x, y = (INSET + LATTICE * chance.randrange((SIDE - SIZE - INSET) // LATTICE + 1) for _ in range(2))
            if all(apart((x, y), other) for other in places):
                places.append((x, y))
        if len(places) == count:
            return places


def _placed(part: dict[str, Any], shapes: tuple[Shape, ...], owners: list[int], index: int) -> bool:
    if "position" not in part:
        return True
    relation, other = part["position"]
    own = [s for s, owner in zip(shapes, owners) if owner == index]
    others = [s for s, owner in zip(shapes, owners) if owner == other]
    return all(relation in relations((a.x - b.x, a.y - b.y), 2 * SIZE) for a in own for b in others)


def relations(offset: tuple[float, float], sizes: float) -> set[str]:
    """The relations of a first object to a second one, as in GenEval's `relative_position`.

    offset: the first centre minus the second, in pixels, y downwards. sizes: the sum of the sides of both. Each offset
    is reduced by a tenth of `sizes`; a direction holds if it is more than half of the remaining length.
    """
    rest = [max(abs(d) - 0.1 * sizes, 0) * (1 if d > 0 else -1) for d in offset]
    length = (rest[0] ** 2 + rest[1] ** 2) ** 0.5
    if not length:
        return set()
    x, y = rest[0] / length, rest[1] / length
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in held.items() if holds}
