"""Prepares an example's pictures for a model, and encodes its prompt."""

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
    """The example with its files and pictures replaced by prepared pictures. Raises ValueError for an unreadable
    picture."""
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
    """Encodes the prompt of a ready example for its task's kind of response. Raises ValueError if the model cannot
    write such responses, or if the prompt is too long."""
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
    """Always returns the tokens that a given region touches."""
    mask = grids.from_pixels(np.asarray(region) > 127, model.images.factor)

    def locate(_: str, grid: tuple[int, int]) -> torch.Tensor:
        if tuple(mask.shape) != tuple(grid):
            raise ValueError(f"the region has {tuple(mask.shape)} tokens, the picture {tuple(grid)}")
        return mask

    return locate
