"""Ids by name that templates of published families need from a spec (see `unidiff.templates`).

Interleaved rounds are our own task. A text ends with the begin-of-image id (`ModelSpec.image_next`) to announce a
picture; the families were trained with this id between text and picture.
"""

from __future__ import annotations

from collections.abc import Mapping

from unidiff.spec import ModelSpec
from unidiff.templates.chat import ChatMarkup


def text_ids(spec: ModelSpec) -> dict[str, int]:
    """The ids that every template needs. Raises ValueError if one is missing."""
    assert spec.bos is not None
    return {"mask": spec.mask, "bos": spec.bos} | special_ids(spec, {"eos": "eos"})


def picture_ids(spec: ModelSpec) -> dict[str, int]:
    """`text_ids` plus the ids that templates with pictures need. Raises ValueError if one is missing."""
    for name in ("image_next", "image_begin", "image_end"):
        if getattr(spec, name) in (None, ()):
            raise ValueError(f"ModelSpec.{name} is {getattr(spec, name)}; the templates of {spec.family} need it")
    assert spec.image_next is not None
    return text_ids(spec) | {
        "image_begin": spec.image_begin[0],
        "image_end": spec.image_end[0],
        "image_next": spec.image_next,
        "image_offset": spec.image_offset,
        "codebook_size": spec.codebook_size,
    }


def special_ids(spec: ModelSpec, names: Mapping[str, str]) -> dict[str, int]:
    """{field: id} from {field: name of a special token}. Raises ValueError for a token that the spec lacks."""
    for name in names.values():
        if name not in spec.special:
            known = ", ".join(spec.special)
            raise ValueError(f"the templates of {spec.family} need the special token {name!r}; it has {known}")
    return {field: spec.special[name] for field, name in names.items()}


def chat_markup(spec: ModelSpec, gap: str = "\n\n") -> ChatMarkup:
    """The headers of a chat. gap: between a header and its text. Raises ValueError if a token is missing."""
    names = {"header_begin": "start_header", "header_end": "end_header", "turn_end": "eot"}
    assert spec.bos is not None
    return ChatMarkup(spec.bos, **special_ids(spec, names), gap=gap)
