"""ModelSpec: it refuses numbers that contradict each other, and says which field to look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch

from tests.tables import each
from unidiff.sequence import Modality, Segment
from unidiff.spec import ModelSpec

Spec = Callable[..., ModelSpec]

WRONG = [
    ({"image_next": 9}, r"image_next is 9, which is not in text_end \(3, 4\)"),
    ({"text_range": (3, 31)}, r"text_range \[3, 31\) is not inside the 30 logit rows"),
    ({"text_range": (8, 3)}, r"text_range \[8, 3\)"),
    ({"text_range": (-1, 8)}, r"text_range \[-1, 8\)"),
    ({"codebook_size": 11}, r"image_range \[20, 31\)"),
    ({"codebook_size": 0}, r"image_range \[20, 20\)"),
    ({"text_range": (3, 21)}, r"text_range \(3, 21\) overlaps the image codes \(20, 28\)"),
    ({"text_range": (3, 30)}, r"overlaps"),
    ({"text_range": (4, 20)}, r"text_end \[3\] lies outside text_range"),
    ({"mask": 30}, r"mask: 30 is not an id below logit_rows 30"),
    ({"mask": None}, r"ModelSpec\.mask is None; it must be a whole number"),
    ({"pad": -1}, r"pad: -1 is not an id"),
    ({"bos": "2"}, r"bos is '2'; it must be a whole number"),
    ({"bos": True}, r"bos is True; it must be a whole number"),
    ({"image_begin": (5, 99)}, r"image_begin: 99 is not an id"),
    ({"image_end": (-2,)}, r"image_end: -2 is not an id"),
    ({"row_separator": 77}, r"row_separator: 77 is not an id"),
    ({"special": {"t2i": 77}}, r"special\['t2i'\]: 77 is not an id"),
    ({"special": {"t2i": "9"}}, r"special\.t2i is '9'; it must be a whole number"),
    ({"attention": "bidirectionnal"}, "attention is 'bidirectionnal'; choose one .* did you mean 'bidirectional'"),
    ({"attention": None}, "attention is None; choose one of block_causal, bidirectional"),
    ({"additive_to": "valid_pair"}, "additive_to is 'valid_pair'; .* did you mean 'valid_pairs'"),
    ({"pad_policy": "HARD"}, "pad_policy is 'HARD'; choose one of hard, attend, additive_one"),
    ({"mask": 22}, r"mask: 22 is an image code, one of \[20, 28\)"),
    ({"image_end": (27,)}, "image_end: 27 is an image code"),
    ({"row_separator": 20}, "row_separator: 20 is an image code"),
    ({"pad": 21}, "pad: 21 is an image code"),
    ({"bos": 25}, "bos: 25 is an image code"),
    ({"special": {"t2i": 23}}, r"special\['t2i'\]: 23 is an image code"),
    ({"mask": 3}, "text_end: 3 is the mask"),
    ({"mask": 5}, "image_begin: 5 is the mask"),
    ({"mask": 2}, "bos: 2 is the mask"),
    ({"text_begin": (0, 2)}, "text_begin: 0 is the mask"),
    ({"special": {"t2i": 0}}, r"special\['t2i'\]: 0 is the mask"),
    ({"image_end": (5, 7)}, "image_end: 5 is taken, by image_begin"),
    ({"row_separator": 7}, "row_separator: 7 is taken, by|image_end: 7 is taken, by row_separator"),
    ({"text_end": (3, 4, 3)}, "text_end: 3 is taken, by text_end"),
    ({"special": {"a": 9, "b": 9}}, r"special\['b'\]: 9 is taken, by special\['a'\]"),
    ({"text_length": 0}, "text_length is 0; it must be at least 1"),
    ({"text_length": 2.5}, r"text_length is 2\.5; it must be a whole number"),
    ({"max_positions": -1}, "max_positions is -1; it must be at least 1"),
    ({"image_grid": (0, 4)}, r"image_grid is \(0, 4\); it must be at least 1"),
    ({"image_grid": (-1, -1)}, r"image_grid is \(-1, -1\)"),
    ({"image_grid": (2, 2, 2)}, r"image_grid is \(2, 2, 2\); it must be 2 values"),
    ({"image_grid": 4}, "image_grid is 4; it must be a list"),
    ({"text_end": "34"}, "text_end is '34'; it must be a list"),
    ({"sampler": [1]}, r"sampler is \[1\]; it must be a mapping"),
    ({"family": None}, "family is None; it must be a text"),
]


@each(("change", "message"), WRONG)
def test_contradictions_are_named(change: dict[str, Any], message: str, toy_spec: Spec) -> None:
    with pytest.raises(ValueError, match=message):
        toy_spec(**change)


def test_ranges(toy_spec: Spec) -> None:
    spec = toy_spec(bos=None, text_range=(3, 5), image_offset=10)
    assert spec.range_of(Modality.TEXT) == (3, 5) and spec.range_of(Modality.IMAGE) == spec.image_range == (10, 18)
    assert spec.codes(torch.tensor([10, 17])).tolist() == [0, 7]
    assert toy_spec(text_range=(28, 30), text_end=(28, 29), image_next=29).text_range == (28, 30)  # behind the codes


def test_a_spec_survives_json(toy_spec: Spec) -> None:
    spec = toy_spec(row_separator=8, sampler={"image_steps": 12}, attention="bidirectional")
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert set(spec.to_dict()) == {f.name for f in fields(ModelSpec)}
    old = {**spec.to_dict(), "pixel_range": [0.0, 1.0]}  # as earlier versions wrote it
    assert ModelSpec.from_dict(old) == spec


def test_unknown_and_missing_fields_are_named(toy_spec: Spec) -> None:
    with pytest.raises(ValueError, match="ModelSpec has no field maks, zzz"):
        ModelSpec.from_dict({**toy_spec().to_dict(), "zzz": 1, "maks": 0})
    with pytest.raises(ValueError, match="ModelSpec has no field maks; did you mean 'mask'"):
        ModelSpec.from_dict({**toy_spec().to_dict(), "maks": 0})
    for nothing in (3, None, "spec", [1]):
        with pytest.raises(ValueError, match="ModelSpec: expected an object with its fields"):
            ModelSpec.from_dict(nothing)
    with pytest.raises(ValueError, match=r"ModelSpec: .*codebook_size"):
        ModelSpec.from_dict({k: v for k, v in toy_spec().to_dict().items() if k != "codebook_size"})


def segment(kind: str, ids: list[int]) -> Segment:
    if kind == "image":
        return Segment(Modality.IMAGE, torch.tensor(ids), grid=(1, len(ids)))
    return Segment(Modality.TEXT, torch.tensor(ids, dtype=torch.int64), prompt=kind == "prompt")


@each(
    ("kind", "ids"),
    [
        ("text", [3, 19, 4]),
        ("text", [9] * 6),
        ("text", []),
        ("prompt", [0, 2, 19, 28, 29]),
        ("prompt", [9] * 40),
        ("image", [20, 27]),
    ],
)
def test_good_segments_pass(kind: str, ids: list[int], toy_spec: Spec) -> None:
    toy_spec().check_segment(segment(kind, ids))


@each(
    ("kind", "ids", "message"),
    [
        ("text", [9, 2], r"text\[2\]: ids \[2\] are not in \[3, 20\), the text range of family 'toy'"),
        ("text", [28], r"ids \[28\] are not in \[3, 20\)"),
        ("text", [-1], r"ids \[-1\]"),
        ("text", [9] * 7, "a sampled text of 7 tokens is longer than text_length 6"),
        ("prompt", [9, 20, 27], r"prompt text\[3\]: ids \[20, 27\] .* without the image codes \[20, 28\]"),
        ("prompt", [30], r"ids \[30\] are not in \[0, 30\)"),
        ("image", [20, 28], r"image\[1×2\]: ids \[28\] are not in \[20, 28\), the image range"),
        ("image", [0, 20], r"ids \[0\]"),
    ],
)
def test_wrong_segments_are_named(kind: str, ids: list[int], message: str, toy_spec: Spec) -> None:
    with pytest.raises(ValueError, match=message):
        toy_spec().check_segment(segment(kind, ids))
