"""ModelSpec: every number in which model families differ. Ids, offsets and lengths are written nowhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import torch

from unidiff.config import check_fields, nearest
from unidiff.sampling.config import SamplerConfig
from unidiff.sequence import Modality, Segment

PadPolicy = Literal["hard", "attend", "additive_one"]
PAD_POLICIES = get_args(PadPolicy)

_RETIRED = {"pixel_range"}  # fields of earlier versions; ignored


@dataclass(frozen=True)
class ModelSpec:
    """Ids, ranges and lengths of one model. Ranges are half-open.

    text_range: ids that a text token may be drawn from, and the rows of the head that score it. image_offset: id of
    code 0 of the codebook. logit_rows: rows of the LM head. text_end: ids that end a sampled text: after `image_next`
    an image follows, after any other the response is finished. A text-only model has image_next None, no image
    delimiters and codebook_size 0. text_length: tokens in the canvas of one sampled text.
    attention: "block_causal" = a token sees every earlier segment and all of its own; "bidirectional" = everything.
    pad_policy, additive_to: how pads enter attention (see `attention.pad_bias`). image_grid: the grid of a new image
    (an edit keeps its own). max_positions: longest sequence. row_separator: id that follows every row of an image.
    text_begin: ids before each text of a prompt; None = bos, if there is one; () = the family's template writes the
    whole prompt. special: other tokens that the family's templates use, by name. sampler: the family's published
    sampler defaults, by name of `SamplerConfig` field.
    """

    family: str
    mask: int
    pad: int
    bos: int | None
    text_end: tuple[int, ...]
    image_next: int | None
    image_begin: tuple[int, ...]
    image_end: tuple[int, ...]
    text_range: tuple[int, int]
    image_offset: int
    codebook_size: int
    logit_rows: int
    image_grid: tuple[int, int]
    text_length: int
    max_positions: int
    row_separator: int | None = None
    text_begin: tuple[int, ...] | None = None
    attention: Literal["block_causal", "bidirectional"] = "block_causal"
    pad_policy: PadPolicy = "hard"
    additive_to: Literal["valid_pairs", "valid_keys"] = "valid_pairs"
    special: dict[str, int] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "ModelSpec.")
        for name in ("logit_rows", "text_length", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelSpec.{name} is {getattr(self, name)}; it must be at least 1")
        self._check_ranges()
        self._check_ids()
        self._check_images()
        try:
            self.sampler_config()
        except (TypeError, ValueError) as error:
            raise ValueError(f"ModelSpec.sampler: {error}") from error

    def sampler_config(self, **settings: Any) -> SamplerConfig:
        """The family's sampler settings, overridden by `settings`. Raises TypeError for an unknown setting, ValueError
        for a wrong value."""
        given, known = {**self.sampler, **settings}, [f.name for f in fields(SamplerConfig)]
        for name in given:
            if name not in known:
                raise TypeError(f"the sampler has no setting {name!r}{nearest(name, known)}")
        return SamplerConfig(**given)

    def _check_ranges(self) -> None:
        if self.image_next is not None and self.image_next not in self.text_end:
            raise ValueError(f"ModelSpec.image_next is {self.image_next}, which is not in text_end {self.text_end}")
        ranges = {"text_range": self.text_range}
        if self.image_next is not None or self.codebook_size:
            ranges["image_range"] = self.image_range
        for name, (low, high) in ranges.items():
            if not 0 <= low < high <= self.logit_rows:
                raise ValueError(f"ModelSpec.{name} [{low}, {high}) is not inside the {self.logit_rows} logit rows")
        if self.text_range[0] < self.image_range[1] and self.image_range[0] < self.text_range[1]:
            raise ValueError(f"ModelSpec.text_range {self.text_range} overlaps the image codes {self.image_range}")
        if outside := [e for e in self.text_end if not self.text_range[0] <= e < self.text_range[1]]:
            raise ValueError(
                f"ModelSpec.text_end {outside} lies outside text_range {self.text_range}: no text could end"
            )

    def _check_ids(self) -> None:
        """Checks that ids are rows of the head, are not image codes, and that delimiters differ from each other."""
        low, high = self.image_range
        ids = self._named_ids()
        for name, id in ids:
            if not 0 <= id < self.logit_rows:
                raise ValueError(f"ModelSpec.{name}: {id} is not an id below logit_rows {self.logit_rows}")
            if low <= id < high:
                raise ValueError(f"ModelSpec.{name}: {id} is an image code, one of [{low}, {high})")
            if id == self.mask and name not in ("mask", "pad"):
                raise ValueError(f"ModelSpec.{name}: {id} is the mask; a masked token must mean nothing else")
        apart = [(n, i) for n, i in ids if n in ("bos", "image_begin", "image_end", "row_separator")]
        for group in (apart, [x for x in ids if x[0] == "text_end"], [x for x in ids if x[0].startswith("special")]):
            owner: dict[int, str] = {}
            for name, id in group:
                if id in owner:
                    raise ValueError(f"ModelSpec.{name}: {id} is taken, by {owner[id]}; each needs an id of its own")
                owner[id] = name

    def _named_ids(self) -> list[tuple[str, int]]:
        """(field name, id) for every id that is neither an image code nor a word."""
        one = [(name, getattr(self, name)) for name in ("mask", "pad", "bos", "row_separator")]
        lists = ("text_end", "text_begin", "image_begin", "image_end")
        several = [(name, id) for name in lists for id in getattr(self, name) or ()]
        special = [(f"special[{name!r}]", id) for name, id in self.special.items()]
        return [(name, id) for name, id in one + several + special if id is not None]

    def _check_images(self) -> None:
        sides, images = self.image_grid, self.codebook_size > 0
        if self.codebook_size < 0 or min(sides) < images:
            name = "codebook_size" if self.codebook_size < 0 else "image_grid"
            raise ValueError(f"ModelSpec.{name} is {getattr(self, name)}; it must be at least {int(images)}")

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids with a special meaning for templates, the sampler and the canvas."""
        return frozenset(id for _, id in self._named_ids())

    @property
    def before_text(self) -> tuple[int, ...]:
        """Ids before a text of a prompt."""
        if self.text_begin is not None:
            return self.text_begin
        return () if self.bos is None else (self.bos,)

    @property
    def before_image(self) -> tuple[int, ...]:
        """Ids before an image that follows a sampled text. A delimiter that already ended the text is left out."""
        return self.image_begin[1:] if self.image_begin[:1] == (self.image_next,) else self.image_begin

    @property
    def image_range(self) -> tuple[int, int]:
        return self.image_offset, self.image_offset + self.codebook_size

    def range_of(self, modality: Modality) -> tuple[int, int]:
        """The ids that a token of this modality is drawn from: the support of sampling and of scoring."""
        return self.text_range if modality is Modality.TEXT else self.image_range

    def check_segment(self, segment: Segment) -> None:
        """Raises ValueError if an id is out of range or a sampled text does not fit its canvas.

        An image contains image codes. A sampled text contains ids of `text_range`, never the mask. A text of a prompt
        contains any id but image codes. A prompt may contain the mask, where guidance hides a token.
        """
        given_text = segment.modality is Modality.TEXT and segment.prompt
        low, high = (0, self.logit_rows) if given_text else self.range_of(segment.modality)
        wrong = (segment.tokens < low) | (segment.tokens >= high)
        masked = segment.tokens == self.mask
        wrong = wrong & ~masked if segment.prompt else wrong | masked
        if given_text:
            wrong |= (segment.tokens >= self.image_range[0]) & (segment.tokens < self.image_range[1])
        if bool(wrong.any()):
            but = f" without the image codes {list(self.image_range)}" if given_text else ""
            raise ValueError(
                f"{segment!r}: ids {segment.tokens[wrong][:3].tolist()} are not in [{low}, {high}){but}, "
                f"the {segment.modality.name.lower()} range of family {self.family!r}"
            )
        if segment.modality is Modality.TEXT and not segment.prompt:
            room = self.room(segment.room)
            if len(segment) > room:
                name = "text_length" if segment.room is None else "its room of"
                raise ValueError(f"a sampled text of {len(segment)} tokens is longer than {name} {room}")

    def room(self, asked: int | None) -> int:
        """Tokens of a text's canvas: `asked`, or `text_length` if None. Raises ValueError if `asked` does not fit."""
        if asked is None:
            return self.text_length
        if not 1 <= asked <= self.text_length:
            raise ValueError(
                f"room is {asked}; a text of this model has 1 to {self.text_length} tokens (its text_length, which can "
                "be set when it is loaded)"
            )
        return asked

    def part_sizes(self, room: int | None, before: Segment | None) -> dict[str, int]:
        """The maximum tokens of a text, of a new picture, and of an edit of the picture `before`."""
        image = math.prod(self.image_grid)
        return {"text": self.room(room), "image": image, "edit": image if before is None else len(before)}

    def codes(self, ids: torch.Tensor) -> torch.Tensor:
        """Image ids in the model's vocabulary -> codes of the VQ tokenizer."""
        return ids - self.image_offset

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> ModelSpec:
        """Reads what `to_dict` wrote (JSON turns tuples into lists). Raises ValueError on unknown or missing fields."""
        if not isinstance(values, Mapping):
            raise ValueError(f"ModelSpec: expected an object with its fields, got {values!r}")
        names = [f.name for f in fields(cls)]
        values = {name: value for name, value in values.items() if name not in _RETIRED}
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"ModelSpec has no field {', '.join(map(str, unknown))}{nearest(unknown[0], names)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"ModelSpec: {error}") from error
