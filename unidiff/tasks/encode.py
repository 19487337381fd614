"""An example as a model reads it: its pictures prepared, its texts and pictures encoded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unidiff.images import grid as grids
from unidiff.images.picture import rgb
from unidiff.model import UnifiedModel
from unidiff.sequence import Locate, Prompt
from unidiff.tasks.task import Task


def ready(model: UnifiedModel, task: Task, example: Any) -> Any:
    """The example with the pictures that the model sees, in place of files and of pictures of any size and mode. Raises
    ValueError for a picture that cannot be read."""
    rule = task.of(example).prepare
    if rule is None and not any(isinstance(part, Path) for part in example.prompt):
        return example
    parts = [part if isinstance(part, str) else _picture(model, part, rule) for part in example.prompt]
    region = example.region
    if region is not None and rule is not None:
        region = model.prepare(region, rule).convert("L")
    return dataclasses.replace(example, prompt=parts, region=region)


def _picture(model: UnifiedModel, part: Image.Image | Path, rule: str | None) -> Image.Image:
    return rgb(part) if rule is None else model.prepare(part, rule)


def encode(model: UnifiedModel, task: Task, example: Any, left_out: Sequence[str] = ()) -> Prompt:
    """The prompt of a ready example, as its task's responses need it. Raises ValueError where the model cannot write
    them, or the prompt is too long."""
    own = task.of(example)
    prompt = model.encode_prompt(
        list(example.prompt),
        left_out,
        own.writes,
        system=own.system if example.system is None else example.system,
        room=own.room,
        locate=own.locate(example) if example.region is None else _inside(model, example.region),
    )
    knows = type(own).simulate is not Task.simulate
    return dataclasses.replace(prompt, simulate=functools.partial(own.simulate, example) if knows else None)


def _inside(model: UnifiedModel, region: Image.Image) -> Locate:
    """The tokens that a given region touches."""
    mask = grids.from_pixels(np.asarray(region) > 127, model.images.factor)

    def locate(_: str, grid: tuple[int, int]) -> torch.Tensor:
        if tuple(mask.shape) != tuple(grid):
            raise ValueError(f"the region has {tuple(mask.shape)} tokens, the picture {tuple(grid)}")
        return mask

    return locate
