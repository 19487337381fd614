"""Checks a task before training: its prompts as the model reads them, and rewards of correct and empty responses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from unidiff.grpo.experience import segment_views
from unidiff.grpo.rollout_file import RolloutBatch, fingerprint
from unidiff.model import UnifiedModel
from unidiff.rewards.names import as_rewards
from unidiff.rewards.table import RewardTable, reward_table
from unidiff.sampling.compute import Compute
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.rollout import Rollout, Stop
from unidiff.sequence import Interleaved, Modality, Prompt, Segment
from unidiff.tasks.encode import encode, ready
from unidiff.tasks.task import Task

RIGHT, EMPTY = "right", "empty"


@dataclass
class Validation:
    """Validated examples of a task. names: "right" or "empty", one per response. prompts: encoded prompts, one per
    response. batch: the responses with their rewards. lines: a printable line per response. faults: the problems
    found, in words."""

    names: list[str]
    prompts: list[Prompt]
    batch: RolloutBatch
    lines: list[str]
    faults: list[str]


def validate(
    model: UnifiedModel, task: Task, split: str = "train", count: int = 5, rewards: Sequence[Any] | None = None
) -> Validation:
    """Scores the correct response (`Task.best`), if known, and an empty response to the first prompts of a split.

    An empty text has no words, an empty picture is black, an empty edit changes nothing. rewards: used instead of the
    task's. Raises ValueError for unusable data.
    """
    task.check()
    task = task.fitted(model)
    own = as_rewards(task.rewards())
    count = min(count, task.length(split) or count)
    names, examples, prompts, rollouts, numbers, faults = [], [], [], [], [], []
    for index in range(count):
        example = ready(model, task, task.example(split, index))
        prompt = encode(model, task, example)
        best = task.best(example)
        for name, parts in ((RIGHT, best), (EMPTY, _empty(model, prompt))):
            if parts is not None:
                try:
                    rollouts.append(as_rollout(model, prompt, parts))
                except ValueError as error:
                    faults.append(f"{split} example {index}: the {name} response: {error}")
                    continue
                names.append(name)
                numbers.append(index)
                prompts.append(prompt)
                examples.append(example)
    views = segment_views(model, rollouts, examples)
    table = reward_table(own if rewards is None else as_rewards(rewards, own), views)
    groups = torch.tensor(numbers)
    batch = RolloutBatch(rollouts, [e.title for e in examples], groups, fingerprint(model), table=table)
    batch.figures = {name: values.tolist() for name, values in task.measure(views, examples).items()}
    lines = [_line(*one, table, row) for row, one in enumerate(zip(names, examples, rollouts))]
    return Validation(names, prompts, batch, lines, faults + _unfair(names, groups.tolist(), table))


def as_rollout(model: UnifiedModel, prompt: Prompt, parts: Sequence[Any]) -> Rollout:
    """Texts and pictures as a rollout, as if sampled. Raises ValueError if a text is too long for its canvas."""
    response = model.encode(parts, prompt=False)
    _check_room(model, prompt, response)
    stop = Stop.DRAWN if response[-1].modality is Modality.IMAGE else Stop.ANSWERED
    whole = prompt.whole + prompt.laid_out(response)
    return Rollout(whole, stop, Compute(), 0, SamplerConfig(), writes=prompt.writes)


def _empty(model: UnifiedModel, prompt: Prompt) -> list[Any]:
    """An empty response; an edit is the unchanged picture, as a segment."""
    height, width = (n * getattr(model.images, "factor", 1) for n in model.spec.image_grid)
    silence = Segment(Modality.TEXT, torch.empty(0, dtype=torch.int64))  # type: ignore[arg-type]
    nothing = {"edit": prompt.whole.last_image(), "image": Image.new("RGB", (width, height))}
    return [nothing.get(kind, silence) for kind in prompt.plan]


def _check_room(model: UnifiedModel, prompt: Prompt, response: Interleaved) -> None:
    room = model.spec.room(prompt.room)
    for one in response:
        if one.modality is Modality.TEXT and len(one) > room:
            raise ValueError(f"it has a text of {len(one)} tokens, and there is room for {room} (room, text_length)")


def _line(name: str, example: Any, rollout: Rollout, table: RewardTable, row: int) -> str:
    """One response in words: its length and its rewards."""
    prompt, response = (sum(map(len, part)) for part in (rollout.sequence.prompt, rollout.segments))
    earned = ", ".join(
        f"{reward} {'–' if math.isnan(value) else f'{value:.3g}'}"
        for reward, value in zip(table.names, table.row_means_BF[row].tolist())
    )
    return f"{example.title or 'example'}: {name}, {prompt} + {response} tokens, earns {earned}"


def _unfair(names: Sequence[str], groups: Sequence[int], table: RewardTable) -> list[str]:
    """Describes examples whose correct response earns no more than the empty one, and rewards without any value."""
    means = table.row_means_BF.numpy()
    earned = np.nansum(means * np.array(table.weights), axis=1)
    totals = dict(zip(zip(groups, names), earned.tolist()))
    faults = [
        f"example {g}: the right response earns {totals[g, RIGHT]:.3g}, the empty one {totals[g, EMPTY]:.3g}"
        for g in dict.fromkeys(groups)
        if (g, RIGHT) in totals and totals[g, RIGHT] <= totals[g, EMPTY]
    ]
    if RIGHT not in names:
        return faults
    never = [name for f, name in enumerate(table.names) if np.isnan(means[:, f]).all()]
    return faults + [f"reward {name!r} has no value for any of these responses" for name in never]
