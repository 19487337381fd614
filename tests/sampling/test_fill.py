"""Layouts of the families' templates, filled: every task, with guidance, in batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.checkpoints import CODES, make_checkpoint
from tests.tables import each
from unidiff import noise
from unidiff.model import UnifiedModel
from unidiff.sampling.completion import complete
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.fill import Filled, fill
from unidiff.templates import Guided, Picture, Role

CONFIG = SamplerConfig(text_steps=4, text_threshold=None, text_block=4, image_steps=4, text_temperature=0.0)
GIVEN = Picture(tuple(range(16)), (4, 4))
HOLE = GIVEN.edited(torch.eye(4).bool())
WIDE = Picture(tuple(range(6)), (2, 3)).edited(torch.ones(2, 3).bool())

TASKS: dict[str, dict[str, Callable[[Any], Guided]]] = {
    "llada": {
        "text": lambda t: t.text("find a safe way", 8, prompt_length=6),
        "chat": lambda t: t.chat("find a safe way", 8),
    },
    "mmada": {
        "text_to_image": lambda t: t.text_to_image("red cube", Picture.blank(4, 4)),
        "inpainting": lambda t: t.text_to_image("red cube", HOLE),
        "understand": lambda t: t.understand("what is red ?", [GIVEN], 8),
        "reason": lambda t: t.reason_then_image("red cube on ball", Picture.blank(4, 4), 24),
    },
    "mmada_parallel": {"parallel": lambda t: t.parallel("red cube", GIVEN, Picture.blank(4, 4), 9)},
    "mmada_parallel_a": {
        "edit": lambda t: t.edit("red cube", [GIVEN], HOLE),
        "parallel": lambda t: t.parallel("red cube", [GIVEN], Picture.blank(4, 4), 8),
    },
    "dimoo": {
        "text_to_image": lambda t: t.text_to_image("red cube", WIDE),
        "edit": lambda t: t.edit("red cube", [GIVEN, GIVEN], Picture.blank(4, 4)),
        "understand": lambda t: t.understand("what is red ?", [GIVEN], 8),
    },
}
CASES = [(family, task) for family, tasks in TASKS.items() for task in tasks]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], UnifiedModel]:
    loaded: dict[str, UnifiedModel] = {}

    def load(family: str) -> UnifiedModel:
        if family not in loaded:
            folder = make_checkpoint(family, tmp_path_factory.mktemp(family), max_sequence_length=1024)
            loaded[family] = UnifiedModel.from_pretrained(folder)
        return loaded[family]

    return load


def check(model: UnifiedModel, guided: Guided, done: Filled) -> None:
    layout, spec = guided.conditional, model.spec
    end = torch.tensor(spec.text_end)
    for i, (was, now) in enumerate(zip(layout.ids, done.ids.tolist(), strict=True)):
        if not layout.target[i]:
            assert now == was and done.step[i] == -1
        elif layout.role[i] is Role.IMAGE:
            assert spec.image_offset <= now < spec.image_offset + CODES and done.step[i] >= 0
    texts = [i for i in layout.targets() if layout.role[i] is Role.TEXT]
    masked = done.ids[texts] == spec.mask
    if bool(masked.any()):  # nothing but what lies behind an end token
        assert bool(torch.isin(done.ids[texts][: int(masked.int().argmax())], end).any())


# Every task, and every family with guidance and without.
GUIDED = {"text_guidance": 0.5, "image_guidance": 2.0, "picture_guidance": 1.0}
SCALED = [(*case, ({}, GUIDED)[i % 2]) for i, case in enumerate(CASES)]
SCALED += [("mmada_parallel", "parallel", (GUIDED, {})[[c[0] for c in CASES].index("mmada_parallel") % 2])]


@pytest.mark.parametrize(("family", "task", "scales"), SCALED, ids=str)
def test_every_task(models: Callable[[str], UnifiedModel], family: str, task: str, scales: dict[str, float]) -> None:
    model = models(family)
    guided = TASKS[family][task](model.template)
    config = SamplerConfig(**{**CONFIG.__dict__, **scales})
    side_by_side = task == "parallel"
    together = fill(model, [guided, guided], [noise.key(1), noise.key(2)], config, side_by_side)
    for key, done in zip((1, 2), together):
        check(model, guided, done)
        (alone,) = fill(model, [guided], [noise.key(key)], config, side_by_side)
        assert torch.equal(alone.ids, done.ids) and torch.equal(alone.step, done.step)
    if task not in ("text", "chat", "understand"):
        grid = (2, 3) if (family, task) == ("dimoo", "text_to_image") else None
        factor = model.images.factor
        rows, columns = grid or (4, 4)
        assert together[0].picture(model, grid).size == (columns * factor, rows * factor)
    if task in ("text", "chat", "understand", "reason", "parallel"):
        assert isinstance(together[0].text(model), str)
    if scales and task == "text_to_image":
        (plain,) = fill(model, [guided], [noise.key(1)], CONFIG)
        assert not torch.equal(plain.ids, together[0].ids)


def test_texts_are_llada_s(models: Callable[[str], UnifiedModel]) -> None:
    """The same tokens as `complete`, which agrees with the golden texts; guidance masks the prompt."""
    model = models("llada")
    guided = model.template.text("find a safe way", 8)
    given = [i for i, hit in zip(guided.conditional.ids, guided.conditional.target) if not hit]
    for scale in (0.0, 1.5):
        config = SamplerConfig(**{**CONFIG.__dict__, "text_guidance": scale, "text_steps": 8})
        (done,) = fill(model, [guided], [noise.key(0)], config)
        expected = complete(model.backbone, [given], 8, 8, 4, guidance=scale, text_end=model.spec.text_end)
        n = int((expected.step[0] >= 0).sum())
        assert torch.equal(done.ids[len(given) :][:n], expected.ids[0, :n])


def test_layouts_that_do_not_fit(models: Callable[[str], UnifiedModel], model: UnifiedModel) -> None:
    mmada = models("mmada")
    picture = mmada.template.text_to_image("red", Picture.blank(4, 4))
    smaller = mmada.template.text_to_image("red", HOLE)
    answer = mmada.template.understand("red", [GIVEN], 4)
    with pytest.raises(ValueError, match="targets of different kinds"):
        fill(mmada, [picture, answer], [1, 2], CONFIG)
    with pytest.raises(ValueError, match=r"have \[4, 16\] targets"):
        fill(mmada, [picture, smaller], [1, 2], CONFIG)
    with pytest.raises(ValueError, match="1 keys do not fit 2 layouts"):
        fill(mmada, [picture, picture], [1], CONFIG)
    with pytest.raises(ValueError, match="'native' is block_causal"):
        fill(model, [picture], [1], CONFIG)
    with pytest.raises(ValueError, match="no text was sampled"):
        fill(mmada, [smaller], [1], CONFIG)[0].text(mmada)


def test_pads_of_a_prefix_do_what_the_policy_says(tmp_path: Path) -> None:
    folder = make_checkpoint("mmada", tmp_path, max_sequence_length=1024)
    ids = []
    for policy in ("hard", "attend", "additive_one"):
        model = UnifiedModel.from_pretrained(folder, pad_policy=policy)
        guided = model.template.text_to_image("red cube", Picture.blank(4, 4))
        ids.append(fill(model, [guided], [noise.key(3)], CONFIG)[0].probability)
    assert not torch.equal(ids[0], ids[1]) and not torch.equal(ids[1], ids[2])


WRONG = {
    "a text letter by letter": ("dimoo", lambda t: t.edit("red", "cube", GIVEN), "given is a str .'cube'.; it must be"),
    "a picture, not a list": ("mmada", lambda t: t.understand("red", GIVEN, 8), "pictures is a Picture"),
    "a word for a picture": ("dimoo", lambda t: t.text_to_image("red", "blank"), r"pictures\[0\] is a str .'blank'"),
    "words for ids": ("mmada", lambda t: t.text(["red"], 8), r"text\[0\] is a str .'red'.; it must be int"),
    "bytes for ids": ("llada", lambda t: t.text(b"red", 8), "text is a bytes"),
    "words for turns": ("llada", lambda t: t.chat(["red"], 8), r"turns\[0\] is 'red'; a turn is .role, text."),
    "messages of another format": ("mmada", lambda t: t.turns({"role": "user"}), r"turns\[0\] is {'role': 'user'}"),
    "half a token": ("mmada", lambda t: t.text("red", 1.5), "length is 1.5; it must be a whole number"),
}


@each(("family", "layout", "message"), WRONG.values())
def test_what_is_no_part_of_a_layout_is_named(
    family: str, layout: Callable[[Any], Guided], message: str, models: Callable[[str], UnifiedModel]
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        layout(models(family).template)


@pytest.mark.parametrize("id", [-1, 10**6])
def test_an_id_that_the_model_does_not_have_is_named(id: int, models: Callable[[str], UnifiedModel]) -> None:
    model = models("llada")
    with pytest.raises(ValueError, match=f"a layout has the id {id}; the model's are 0 to {model.spec.logit_rows - 1}"):
        fill(model, [model.template.text([id], 8)], [noise.key(0)], CONFIG)
