"""Controls of interleaved rounds: no pictures, the right ones, or those of another example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.covering import slow_after
from unidiff import InterleavedSampler, SamplerConfig, UnifiedModel, noise, rollout
from unidiff.sampling.rollout import Rollout
from unidiff.sequence import Modality, Segment
from unidiff.tasks import FrozenLake
from unidiff.tasks.encode import encode
from unidiff.tasks.frozen_lake.board import replay
from unidiff.tasks.task import ELSEWHERE


@pytest.fixture(scope="module")
def sampled(model: UnifiedModel, task: FrozenLake) -> Callable[..., list[Rollout]]:
    """sampled(pictures, of=…) -> rollouts of six boards."""
    examples = [task.example("train", i) for i in range(6)]

    def run(pictures: str, of: UnifiedModel = model, **settings: Any) -> list[Rollout]:
        prompts = [encode(of, task, example) for example in examples]
        sampler = InterleavedSampler(
            of, SamplerConfig(picture_source=pictures, max_rounds=3, image_steps=2, **settings)
        )  # type: ignore[arg-type]
        return sampler.sample(prompts, [noise.key(0, i) for i in range(len(prompts))])

    return run


def images(one: Rollout) -> list[Segment]:
    return [s for s in one.segments if s.modality is Modality.IMAGE]


def texts(model: UnifiedModel, one: Rollout) -> list[str]:
    return [model.decode_text(s.tokens) for s in one.segments if s.modality is Modality.TEXT]


def test_no_pictures(sampled: Callable[..., list[Rollout]]) -> None:
    found = sampled("none")
    assert any(len(one.segments) > 1 for one in found) and not any(images(one) for one in found)
    assert all(one.compute.pictures.token_forwards == 0 for one in found)
    own = sampled("own")
    assert [one.segments[0].tokens.tolist() for one in found] == [one.segments[0].tokens.tolist() for one in own]


@pytest.mark.parametrize("pictures", ["oracle", "shuffled"])
def test_given_pictures(
    model: UnifiedModel, task: FrozenLake, sampled: Callable[..., list[Rollout]], pictures: str
) -> None:
    found, seen = sampled(pictures), 0
    for index, one in enumerate(found):
        example, said = task.example("train", index), texts(model, one)
        for number, image in enumerate(images(one), 1):
            if pictures == "oracle":
                right = task.render(example.board, replay(example.board, said[:number]).agent)
            else:
                other = task.demonstration(task.example("train", index + ELSEWHERE))[1::2]
                right = other[min(number, len(other)) - 1]
            assert torch.equal(image.tokens, model.encode_images([right])[0][0])
            assert image.edited is not None and not image.edited.any() and not image.sampled.any()
            seen += 1
    assert seen > 4


@pytest.mark.parametrize(("pictures", "cache"), slow_after(1, [("oracle", False), ("none", True), ("shuffled", True)]))
def test_texts_are_scored_as_they_were_drawn(
    model: UnifiedModel, sampled: Callable[..., list[Rollout]], pictures: str, cache: bool
) -> None:
    """Token by token, in the state in which each was drawn."""
    found = sampled(pictures, text_block=1, cache=cache)
    canvas = model.render([one.sequence for one in found])
    assert not bool((canvas.sampled & (canvas.modality == Modality.IMAGE)).any())
    checked = 0
    for row, one in enumerate(found):
        for ordinal, segment in enumerate(one.sequence):
            if segment.prompt or segment.modality is Modality.IMAGE:
                continue
            columns = ((canvas.segment[row] == ordinal) & (canvas.clean.offset[row] >= 0)).nonzero()[:, 0]
            for place, column in enumerate(columns.tolist()):
                mask = torch.zeros_like(canvas.sampled)
                mask[row, columns[place:]] = True
                with torch.no_grad():
                    value = model.score(canvas, mask)[row, column]
                assert segment.probability is not None
                assert value.item() == pytest.approx(float(segment.probability[place].log()), abs=2e-5)
                checked += 1
    assert checked > 20


def test_what_cannot_be_controlled(model: UnifiedModel, task: FrozenLake) -> None:
    prompt = task.example("train", 0).prompt
    with pytest.raises(ValueError, match="picture_source is 'oracle', but the task has no `simulate`"):
        rollout(model, prompt, picture_source="oracle")
    with pytest.raises(ValueError, match="picture_source is 'none', which is a control of interleaved rounds"):
        rollout(model, prompt, writes="edit", picture_source="none", edit="full")
    with pytest.raises(ValueError, match="picture_source is 'wrong'"):
        SamplerConfig(picture_source="wrong")  # type: ignore[arg-type]
