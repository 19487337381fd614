"""What a response consists of, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from unidiff.sequence import Kind


@dataclass(frozen=True)
class Part:
    """One part of a response: a text, a new picture, or a changed copy of the last picture (a new one where there is
    none). open: a picture follows a text only if it says so, by the token that it ends with."""

    kind: Literal["text", "image", "edit"]
    open: bool = False


def parts_of(plan: Sequence[Kind], max_rounds: int) -> list[Part]:
    """A plan as parts. Interleaved rounds end with a text, after at most `max_rounds` pictures."""
    parts: list[Part] = []
    for kind in plan:
        if kind == "interleaved":
            parts += [Part("text", open=True), Part("edit")] * max_rounds + [Part("text", open=True)]
        else:
            parts.append(Part("text" if kind == "understand" else kind))
    return parts
