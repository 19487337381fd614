"""Verifies that a picture shows what a row asks for: strictly (0 or 1) and softly (0 to 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unidiff.tasks.shapes.look import Seen
from unidiff.tasks.shapes.prompts import Row, relations


def strict(row: Row, seen: Sequence[Seen]) -> bool:
    """Whether a picture has every requested count, colour and place, only clear shapes, and nothing else."""
    return all(shape.clear for shape in seen) and _degrees(row, seen) == 1.0


def soft(row: Row, seen: Sequence[Seen]) -> float:
    """The degree, 0 to 1, to which a picture shows the request; unclear shapes lower it."""
    return _degrees(row, [shape for shape in seen if shape.clear]) * _share_clear(seen)


def _share_clear(seen: Sequence[Seen]) -> float:
    return sum(shape.clear for shape in seen) / len(seen) if seen else 1.0


def _degrees(row: Row, seen: Sequence[Seen]) -> float:
    """The mean over the requested kinds, counts, colours and places. Unexpected shapes lower it."""
    groups = _groups(row, seen)
    scores: list[float] = []
    for part, (own, kin) in zip(row["include"], groups):
        scores.append(1.0 if kin else 0.0)
        scores.append(_nearness(len(kin), part["count"]))
        if "color" in part:
            scores.append(_nearness(len(own), part["count"]))
        if "position" in part:
            relation, other = part["position"]
            pairs = [(a, b) for a in own for b in groups[other][0]]
            held = sum(relation in relations(_offset(a, b), _sides(a, b)) for a, b in pairs)
            scores.append(held / len(pairs) if pairs else 0.0)
    wanted = {id(shape) for own, kin in groups for shape in kin}
    extra = sum(id(shape) not in wanted for shape in seen)
    return sum(scores) / len(scores) / (1 + extra)


def _groups(row: Row, seen: Sequence[Seen]) -> list[tuple[list[Seen], list[Seen]]]:
    """For each part of a row: shapes of its kind and colour, and shapes of its kind in no other part's colour."""
    groups = []
    for part in row["include"]:
        rivals = [p["color"] for p in row["include"] if p is not part and p["class"] == part["class"] and "color" in p]
        kin = [s for s in seen if s.kind == part["class"] and (s.colour not in rivals or s.colour == part.get("color"))]
        groups.append(([s for s in kin if s.colour == part.get("color", s.colour)], kin))
    return groups


def _nearness(found: int, wanted: int) -> float:
    return max(0.0, 1.0 - abs(found - wanted) / wanted)


def _offset(a: Seen, b: Seen) -> tuple[float, float]:
    return a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]


def _sides(a: Seen, b: Seen) -> Any:
    return max(a.right - a.left, a.bottom - a.top) + max(b.right - b.left, b.bottom - b.top)
