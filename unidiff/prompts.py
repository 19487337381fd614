"""Encodes prompts (by the family's template) and given responses as sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from PIL.Image import Image

from unidiff.sequence import Interleaved, Locate, Modality, Prompt, Segment, Writes, check_parts, hidden, plan_of
from unidiff.templates import Picture

if TYPE_CHECKING:
    from unidiff.model import UnifiedModel


@dataclass(frozen=True)
class Asked:
    """The requested response; see `UnifiedModel.encode_prompt`."""

    writes: Writes
    system: str | None
    room: int | None
    locate: Locate | None


def encode(model: UnifiedModel, parts: Sequence[str | Image], left_out: Sequence[str], asked: Asked) -> Prompt:
    """Encodes texts and prepared pictures as a prompt. Raises ValueError if the model cannot write the response or has
    too few positions."""
    _check_writes(model, parts, asked)
    if model.template is None:
        kinds = {"text": Modality.TEXT, "image": Modality.IMAGE}
        given = parts if asked.system is None else [asked.system, *parts]
        whole = Interleaved(_plain(model, part) for part in given)
        without = {name: hidden(whole, kinds[name], model.spec.mask) for name in left_out}
        behind = ()
    else:
        kind = asked.writes if isinstance(asked.writes, str) else "interleaved"
        coded = _pictures(model, parts)
        whole = model.template.prompt(coded, None, kind, asked.system)
        without = {name: model.template.prompt(coded, name, kind, asked.system) for name in left_out}
        behind = model.template.behind(kind)
    _check_fits(model, whole, asked)
    words = " ".join(part for part in parts if isinstance(part, str))
    return Prompt(whole, without, asked.writes, asked.room, behind, words, asked.locate)


def _plain(model: UnifiedModel, part: str | Image) -> Segment:
    if isinstance(part, str):
        return Segment(Modality.TEXT, model.encode_text(part), True)
    tokens, grid = model.encode_images([part])[0]
    return Segment(Modality.IMAGE, tokens, True, grid)


def encode_response(model: UnifiedModel, parts: Sequence[str | Image | Segment]) -> Interleaved:
    """Encodes texts, PIL images and segments as a response of the model. Every text gets an end token: before an image
    the one that announces it, else the first other one of the spec.

    Raises TypeError for other parts, ValueError for a text with a word that the tokenizer lacks, and for a response
    that exceeds the model's positions.
    """
    check_parts(parts, "response", str, Image, Segment)
    pictures = [part for part in parts if isinstance(part, Image)]
    alike = len({picture.size for picture in pictures}) == 1
    coded = iter(model.encode_images(pictures) if alike else [model.encode_images([p])[0] for p in pictures])
    segments = []
    for part in parts:
        if isinstance(part, Segment):
            segments.append(replace(part, prompt=False))
        elif isinstance(part, str):
            segments.append(Segment(Modality.TEXT, model.encode_text(part)))
        else:
            tokens, grid = next(coded)
            segments.append(Segment(Modality.IMAGE, tokens, grid=grid))
    length = sum(map(len, segments))
    if length > model.spec.max_positions:
        raise ValueError(f"the response has {length} tokens, the model {model.spec.max_positions} positions")
    return Interleaved(_ended(model, one, after) for one, after in zip(segments, [*segments[1:], None]))


def _ended(model: UnifiedModel, segment: Segment, following: Segment | None) -> Segment:
    if segment.modality is Modality.IMAGE:
        return segment
    spec = model.spec
    low, high = spec.range_of(Modality.TEXT)
    if bool(((segment.tokens < low) | (segment.tokens >= high)).any()):
        raise ValueError(
            f"the model cannot write {model.decode_text(segment.tokens)!r}: its tokenizer lacks a word of it"
        )
    image_next = following is not None and following.modality is Modality.IMAGE
    end = spec.image_next if image_next else next(e for e in spec.text_end if e != spec.image_next)
    return Segment(Modality.TEXT, torch.cat([segment.tokens, torch.tensor([end])]))  # type: ignore[arg-type]


def _check_writes(model: UnifiedModel, parts: Sequence[str | Image], asked: Asked) -> None:
    """Raises ValueError if the model cannot write such a response to these parts."""
    model.spec.room(asked.room)
    plan = plan_of(asked.writes)
    if {"image", "edit"} & set(plan) and not model.spec.codebook_size:
        raise ValueError(f"writes is {asked.writes!r}, but family {model.spec.family} is one of text alone")
    if plan[0] == "edit" and all(isinstance(part, str) for part in parts):
        raise ValueError("writes is 'edit', but the prompt has no picture to edit")


def _check_fits(model: UnifiedModel, prompt: Interleaved, asked: Asked) -> None:
    """Raises ValueError if the model lacks positions for a prompt and the certain parts of its response."""
    sizes = model.spec.part_sizes(asked.room, prompt.last_image())
    sizes["understand"] = sizes["text"]
    length = sum(map(len, prompt))
    least = sum(sizes.get(part, 0) for part in plan_of(asked.writes))
    if length + least > model.spec.max_positions:
        raise ValueError(
            f"the prompt has {length} tokens, its response {least}, and the model {model.spec.max_positions} "
            "positions; shorten the prompt or the response (room, text_length)"
        )


def _pictures(model: UnifiedModel, parts: Sequence[str | Image]) -> list[str | Picture]:
    """PIL images as codes."""
    out: list[str | Picture] = []
    for part in parts:
        if isinstance(part, str):
            out.append(part)
        else:
            tokens, grid = model.encode_images([part])[0]
            out.append(Picture.of(model.spec.codes(tokens).reshape(grid)))
    return out
