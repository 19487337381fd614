"""Every kind of response, for every family: what is scored is what was sampled, and kept tokens stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.covering import pairs
from unidiff import noise
from unidiff.guidance import Guidance
from unidiff.model import UnifiedModel
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.edit import box
from unidiff.sampling.plan import Part, parts_of
from unidiff.sampling.rollout import Rollout, Stop
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.sequence import Modality, Prompt, Writes, check_writes

FAMILIES = ("native", "llada", "mmada", "mmada_parallel_a", "dimoo")
KINDS: tuple[Writes, ...] = ("text", "image", "edit", "understand", "interleaved", ("image", "text"), ("text", "image"))
# All tokens of a segment are drawn in one step, when all of them are masked: as `score` masks them.
ONE_STEP = {"text_steps": 1, "text_threshold": None, "image_steps": 1, "max_rounds": 1, "edit": "confidence"}
WARM = {"text_temperature": 0.8, "image_temperature": 1.3}
GUIDED = {"text_guidance": 0.7, "image_guidance": 1.5}


PICTURED = tuple(family for family in FAMILIES if family != "llada")  # the others' models are of text alone


def on(families: tuple[str, ...], names: str = "", *cases: tuple) -> pytest.MarkDecorator:
    """Cases of a model of each of these families, or of a model and values of further names."""
    found = cases or [(family,) for family in families]
    return pytest.mark.parametrize(["model", *names.split()], found, indirect=["model"], ids=str)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, published: Callable[[str], Path]) -> UnifiedModel:
    if request.param == "native":
        return request.getfixturevalue("exact_model")
    return UnifiedModel.from_pretrained(published(request.param))


def picture(model: UnifiedModel, rows: int = 4, columns: int = 4) -> Image.Image:
    rows, columns = model.spec.image_grid if model.spec.family == "native" else (rows, columns)
    codes = torch.arange(rows * columns).reshape(1, -1) % model.spec.codebook_size + model.spec.image_offset
    pixels = model.decode_pixels(codes, (rows, columns))[0].permute(1, 2, 0).clamp(0, 1)
    return Image.fromarray((pixels * 255).round().byte().numpy())


def prompts(model: UnifiedModel, writes: Writes, guides: tuple[str, ...]) -> list[Prompt]:
    """Two prompts of different lengths."""
    shown = [picture(model)] if model.images is not None and writes not in ("text", "image") else []
    words = ["find a safe way to the goal", "go right"]
    return [model.encode_prompt([*shown, text], guides, writes, room=min(8, model.spec.text_length)) for text in words]


def sampled(model: UnifiedModel, writes: Writes, **settings: object) -> list[Rollout]:
    config = SamplerConfig(**{**ONE_STEP, **settings})  # type: ignore[arg-type]
    sampler = InterleavedSampler(model, config)
    return sampler.sample(prompts(model, writes, config.guides), [noise.key(i) for i in range(4)])


def draws(writes: Writes) -> bool:
    return bool({"image", "edit"} & {writes, *(writes if isinstance(writes, tuple) else ())})


CASES = [case for case in pairs(FAMILIES, KINDS, (WARM, WARM | GUIDED)) if case[0] != "llada" or not draws(case[1])]


@on(FAMILIES, "writes settings", *CASES)
def test_what_is_scored_is_what_was_sampled(model: UnifiedModel, writes: Writes, settings: dict[str, float]) -> None:
    """And a response has the parts of its plan."""
    done = sampled(model, writes, **settings)
    canvas = model.render([r.sequence for r in done])
    without = {name: [r.without[name] for r in done] for name in done[0].without}
    guidance = Guidance.of(without, [r.segments for r in done], done[0].settings.scales, model.spec)
    with torch.no_grad():
        logp = model.score(canvas, canvas.sampled, temperature=(0.8, 1.3), guidance=guidance)
        apart = [model.render([r.sequence]) for r in done]
        alone = [model.score(c, c.sampled, temperature=(0.8, 1.3)) for c in apart]
    for row, rollout in enumerate(done):
        kept = [s.probability[s.sampled] for s in rollout.segments if s.probability is not None]
        assert torch.allclose(logp[row][canvas.sampled[row]].exp(), torch.cat(kept), atol=2e-5, rtol=0)
        if guidance is None:  # in company or alone
            own = alone[row][apart[row].sampled]
            assert torch.allclose(own, logp[row][canvas.sampled[row]], atol=2e-5, rtol=0)
        has_its_parts(rollout, writes)


def has_its_parts(rollout: Rollout, writes: Writes) -> None:
    kinds = [s.modality for s in rollout.segments]
    named = {"text": Modality.TEXT, "understand": Modality.TEXT, "image": Modality.IMAGE, "edit": Modality.IMAGE}
    if writes == "interleaved":
        assert kinds[0] is Modality.TEXT and kinds[-1] is Modality.TEXT
    else:
        plan = (writes,) if isinstance(writes, str) else writes
        assert kinds == [named[part] for part in plan]
        assert (rollout.stop is Stop.DRAWN) == (kinds[-1] is Modality.IMAGE)
    assert rollout.writes == writes


@on(PICTURED, "edit", *pairs(PICTURED, ("confidence", "random", "region", "full")))
def test_an_edit_keeps_what_it_does_not_choose(model: UnifiedModel, edit: str) -> None:
    config = SamplerConfig(edit=edit, image_steps=3)  # type: ignore[arg-type]
    sampler = InterleavedSampler(model, config, box(1, 0, 3, 2) if edit == "region" else None)
    for prompt, rollout in zip(prompts(model, "edit", ()), sampler.sample(prompts(model, "edit", ()), [1, 2])):
        (new,), old = rollout.segments, prompt.whole.last_image()
        assert old is not None and old.grid == new.grid
        if edit == "full":
            assert new.edited is None
            continue
        assert new.edited is not None and 0 < new.edited.sum() < len(new)
        assert torch.equal(new.tokens[~new.edited], old.tokens[~new.edited])
        if edit == "region":
            assert new.edited.reshape(new.grid).nonzero().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]


@on(PICTURED)
def test_a_batch_of_several_kinds_and_grids(model: UnifiedModel) -> None:
    shown, wide = picture(model), picture(model, 2, 3)
    given: list[tuple[list, Writes]] = [([shown, "go"], "edit"), ([wide, "go right"], "edit"), (["a goal"], "image")]
    given += [([shown, wide, "go"], "understand"), (["go"], ("image", "text")), ([wide, "go"], "interleaved")]
    rows = [model.encode_prompt(parts, writes=writes, room=6) for parts, writes in given]
    sampler = InterleavedSampler(model, SamplerConfig(edit="confidence", max_rounds=1))
    together = sampler.sample(rows, range(2 * len(rows)))
    for place, row in enumerate(rows):
        for one, other in zip(sampler.sample([row], [2 * place, 2 * place + 1]), together[2 * place :]):
            assert [s.tokens.tolist() for s in one.segments] == [s.tokens.tolist() for s in other.segments]


@on(PICTURED)
def test_a_prompt_s_own_place_is_edited(model: UnifiedModel) -> None:
    said = []

    def locate(text: str, grid: tuple[int, int]) -> np.ndarray:
        said.append(text)
        return np.eye(*grid, dtype=bool)

    own = model.encode_prompt([picture(model), "go right"], writes="edit", locate=locate)
    (rollout,) = InterleavedSampler(model, SamplerConfig()).sample([own], [3])
    assert said == ["go right"]
    assert int(rollout.segments[0].edited.sum()) == min(rollout.segments[0].grid)


@on(FAMILIES)
def test_room_is_a_text_s_canvas(model: UnifiedModel) -> None:
    prompt = model.encode_prompt(["go right"], writes="text", room=3)
    (rollout,) = InterleavedSampler(model, SamplerConfig()).sample([prompt], [3])
    assert len(rollout.segments[0]) <= 3 and rollout.segments[0].room == 3
    with pytest.raises(ValueError, match=r"room is 100000; a text of this model has 1 to \d+ tokens"):
        model.encode_prompt(["go right"], writes="text", room=100000)


@on(FAMILIES)
def test_what_a_model_cannot_write_is_refused(model: UnifiedModel) -> None:
    if model.images is None:
        with pytest.raises(ValueError, match="writes is 'image', but family llada is one of text alone"):
            model.encode_prompt(["go right"], writes="image")
    else:
        with pytest.raises(ValueError, match="writes is 'edit', but the prompt has no picture to edit"):
            model.encode_prompt(["go right"], writes="edit")
    with pytest.raises(ValueError, match=r"writes is 'video'; choose one of text, image"):
        model.encode_prompt(["go right"], writes="video")  # type: ignore[arg-type]


def test_plans() -> None:
    text, image = Part("text", open=True), Part("edit")
    assert parts_of(("interleaved",), 2) == [text, image, text, image, text]
    assert parts_of(("image", "interleaved"), 1) == [Part("image"), text, image, text]
    assert parts_of(("understand",), 4) == [Part("text")]
    assert check_writes(["text", "image"]) == ("text", "image")
    for wrong in ((), ("interleaved", "text"), 3, None):
        with pytest.raises(ValueError, match="writes is "):
            check_writes(wrong)
