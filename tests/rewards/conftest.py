"""Fixtures: responses made by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from unidiff.rewards.segment_view import SegmentView, link_row
from unidiff.sequence import Modality

Rows = list[tuple[SegmentView, ...]]


def _text(content: str) -> SegmentView:
    return SegmentView(modality=Modality.TEXT, tokens=torch.arange(len(content)), text=content)


def _picture(gray: int) -> SegmentView:
    pixels, edited = np.full((4, 6, 3), gray, dtype=np.uint8), np.zeros((2, 3), bool)
    return SegmentView(modality=Modality.IMAGE, tokens=torch.arange(6), pixels=pixels, edited=edited)


@pytest.fixture
def responses() -> Callable[..., Rows]:
    """responses(count) -> rows of text, image, text, with an `answer` and a list among their columns."""

    def make(count: int = 3) -> Rows:
        board = {"cells": [1, 2, 3]}  # one object of all rows, as the G rollouts of a prompt have it
        prompt = ["q", Image.new("RGB", (6, 4), (9, 9, 9))]
        return [
            link_row(
                [_text(f"a{i}"), _picture(i), _text(f"b{i}")],
                prompt=prompt,
                task=board,
                columns={"answer": i, "board": board},
            )
            for i in range(count)
        ]

    return make
