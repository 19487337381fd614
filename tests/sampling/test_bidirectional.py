"""Rollouts of bidirectional models, and guidance: what is sampled is what is scored, whatever the batch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import unidiff
from tests.families.checkpoints import formula, make_checkpoint, write_weights
from unidiff import noise
from unidiff.families import load_backbone
from unidiff.grpo.experience import guidance_of
from unidiff.model import UnifiedModel
from unidiff.report.regeneration import full_regeneration
from unidiff.sampling.completion import complete
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.edit import box
from unidiff.sampling.rollout import Rollout
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.sequence import Modality

PICTURED = ("mmada", "mmada_parallel", "mmada_parallel_a", "dimoo")
DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture(scope="module", params=("llada", *PICTURED))
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> UnifiedModel:
    return load(request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=PICTURED)
def pictured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> UnifiedModel:
    return drawing(load(request.param, tmp_path_factory))


def load(family: str, factory: pytest.TempPathFactory) -> UnifiedModel:
    return UnifiedModel.from_pretrained(make_checkpoint(family, factory.mktemp(family)))


def drawing(model: UnifiedModel) -> UnifiedModel:
    """Random weights hardly ever announce a picture. With a text range of two words they do."""
    announce = model.spec.image_next
    assert announce is not None
    model.spec = dataclasses.replace(model.spec, text_range=(announce, announce + 2), text_end=(announce,))
    return model


def parts(model: UnifiedModel, colour: str = "red", words: str = "find a safe way") -> list[Any]:
    if model.images is None:
        return [words]
    return [words, Image.new("RGB", (4 * model.images.factor, 4 * model.images.factor), colour)]


def sample(model: UnifiedModel, count: int = 3, locate: Any = None, **settings: Any) -> list[Rollout]:
    config = SamplerConfig(**{"edit": "random", "edit_share": 0.3, "max_rounds": 2, "image_steps": 4, **settings})
    prompts = [parts(model, "red"), parts(model, "blue", "go to the goal then")]
    encoded = [model.encode_prompt(p, config.guides) for p in prompts]
    keys = [noise.key(7, i) for i in range(2 * count)]
    return InterleavedSampler(model, config, locate).sample(encoded, keys)


GUIDED = {"text_guidance": 0.7, "image_guidance": 1.5, "picture_guidance": 0.8}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"text_threshold": None, "text_steps": 4, "text_block": 4, "image_sampler": "emerge"},
    {"text_temperature": 0.7, "image_temperature": 1.4, "edit": "full"},
    {"edit": "confidence", **GUIDED},
    {"text_threshold": None, "text_steps": 8, "text_block": 2, "image_guidance": 2.0, "image_annealing": "constant"},
]
EACH = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "default")


def error_of_first_steps(model: UnifiedModel, rollouts: list[Rollout]) -> torch.Tensor:
    """Of tokens that were drawn in the first step of their segment: recorded probability less the score with all of the
    segment masked, guidance and temperature as sampled."""
    canvas = model.render([r.sequence for r in rollouts])
    recorded, first = torch.ones(canvas.shape), torch.zeros(canvas.shape, dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        for s, segment in enumerate(rollout.sequence):
            if not segment.prompt:
                inside = (canvas.segment[row] == s) & (canvas.clean.offset[row] >= 0)
                recorded[row, inside], first[row, inside] = segment.probability, segment.step == 0
    settings = rollouts[0].settings
    temperature = settings.text_temperature, settings.image_temperature
    guidance = guidance_of(model, rollouts, settings.scales)
    scored = model.score(canvas, canvas.sampled, temperature=temperature, guidance=guidance).detach()
    return (recorded - scored.exp())[first & canvas.sampled]


@pytest.mark.parametrize(
    ("any_model", "settings"),
    [*(("llada", own) for own in SETTINGS), *zip(PICTURED, SETTINGS[1:])],
    indirect=["any_model"],
    ids=str,
)
def test_what_is_sampled_is_what_is_scored(any_model: UnifiedModel, settings: dict[str, Any]) -> None:
    """Texts of the whole vocabulary, which hardly ever announce a picture."""
    rollouts = sample(any_model, **settings)
    error = error_of_first_steps(any_model, rollouts)
    assert len(error) > 0 and error.abs().max() < 2e-5


@EACH
def test_what_is_drawn_is_what_is_scored(pictured: UnifiedModel, settings: dict[str, Any]) -> None:
    """Texts of two words, and pictures."""
    rollouts = sample(pictured, **settings)
    error = error_of_first_steps(pictured, rollouts)
    assert sum(s.modality is Modality.IMAGE for r in rollouts for s in r.segments) >= 4
    assert len(error) >= 10 and error.abs().max() < 2e-5


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[3]], ids=["plain", "guided"])
def test_a_row_knows_nothing_of_the_others(pictured: UnifiedModel, settings: dict[str, Any]) -> None:
    config = SamplerConfig(edit_share=0.3, max_rounds=2, image_steps=4, **{"edit": "random", **settings})
    together = sample(pictured, **settings)
    for i in (0, 4):
        own = parts(pictured, "red") if i < 3 else parts(pictured, "blue", "go to the goal then")
        prompt = pictured.encode_prompt(own, config.guides)
        (alone,) = InterleavedSampler(pictured, config).sample([prompt], [noise.key(7, i)])
        assert alone.stop is together[i].stop
        for a, b in zip(alone.segments, together[i].segments, strict=True):
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.step, b.step)


def test_edits_keep_what_they_do_not_touch(pictured: UnifiedModel) -> None:
    """Invariant 3: outside the box, bit by bit; row separators and delimiters are none of the tokens."""
    rollouts = sample(pictured, locate=box(1, 1, 3, 3), edit="region")
    before = {0: parts(pictured, "red")[1], 1: parts(pictured, "blue")[1]}
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1:3, 1:3] = True
    seen = 0
    for i, rollout in enumerate(rollouts):
        last = pictured.encode_images([before[i // 3]])[0][0]
        for segment in rollout.segments:
            if segment.modality is Modality.IMAGE:
                assert segment.edited is not None and torch.equal(segment.edited, mask.flatten())
                assert torch.equal(segment.tokens[~segment.edited], last[~segment.edited])
                last, seen = segment.tokens, seen + 1
        canvas = pictured.render([rollout.sequence])
        separators = canvas.ids[0] == pictured.spec.row_separator
        assert not bool((canvas.sampled[0] & separators).any())
    assert seen >= 3


def test_guidance_of_scale_0_is_none(pictured: UnifiedModel) -> None:
    plain, guided = sample(pictured), sample(pictured, image_guidance=3.0)
    assert plain[0].without == {} and set(guided[0].without) == {"text"}
    images = [[s.tokens for s in r.segments if s.modality is Modality.IMAGE] for r in plain + guided]
    first = [(a[0], b[0]) for a, b in zip(images[:6], images[6:]) if a and b]
    assert first and any(not torch.equal(a, b) for a, b in first)  # the same noise, other pictures


def test_guided_scores_by_hand(pictured: UnifiedModel) -> None:
    """(1 + s + t) c − s u − t v, from three plain forwards over one row."""
    rollouts = sample(pictured, **{**GUIDED, "text_guidance": 0.0})
    rollout = next(r for r in rollouts if any(s.modality is Modality.IMAGE for s in r.segments))
    guidance = guidance_of(pictured, [rollout], rollout.settings.scales)
    canvas = pictured.render([rollout.sequence])
    image = (
        canvas.sampled & (canvas.modality == Modality.IMAGE) & (canvas.segment == canvas.segment[canvas.sampled][-1])
    )
    text = canvas.sampled & (canvas.modality == Modality.TEXT)
    found = pictured.score(canvas, text, guidance=guidance)
    assert torch.equal(found, pictured.score(canvas, text))  # texts have no guidance here
    ordinal = max(i for i, s in enumerate(rollout.sequence) if s.modality is Modality.IMAGE)
    image = canvas.sampled & (canvas.segment == ordinal)
    low, high = pictured.spec.image_range
    logits = []
    cut = type(rollout.sequence)(rollout.sequence[: ordinal + 1])
    for prompt in (cut.prompt, rollout.without["text"], rollout.without["image"]):
        row = pictured.render([prompt + cut.response])
        hidden = row.ids.masked_fill(row.sampled & (row.segment == row.segment.max()), pictured.spec.mask)
        at = (row.sampled & (row.segment == row.segment.max()))[0]
        logits.append(pictured.backbone.logits(hidden)[0, at, low:high].double().detach())
    s, t = GUIDED["image_guidance"], GUIDED["picture_guidance"]
    combined = ((1 + s + t) * logits[0] - s * logits[1] - t * logits[2]).log_softmax(-1)
    expected = combined.gather(1, (canvas.ids[image] - low)[:, None])[:, 0]
    assert (pictured.score(canvas, image, guidance=guidance)[image].detach() - expected).abs().max() < 5e-5


def test_guidance_needs_its_prompts(pictured: UnifiedModel) -> None:
    sampler = InterleavedSampler(pictured, SamplerConfig(edit="full", image_guidance=1.0))
    with pytest.raises(ValueError, match=r"guidance needs each prompt without its text too: encode it by"):
        sampler.sample([pictured.encode(parts(pictured))], [1])


def test_prompts_that_leave_something_out(any_model: UnifiedModel) -> None:
    prompt = any_model.encode_prompt(
        parts(any_model, words="red cube"), ("text", "image") if any_model.images else ("text",)
    )
    words = set(any_model.encode_text("red cube").tolist())
    assert words <= set(torch.cat([s.tokens for s in prompt.whole]).tolist())
    assert not words & set(torch.cat([s.tokens for s in prompt.without["text"]]).tolist())
    if any_model.images is not None:
        assert prompt.whole.last_image() is not None and prompt.without["text"].last_image() is not None
        assert prompt.without["image"].last_image() is None


def test_the_sampler_of_a_family_is_data(pictured: UnifiedModel) -> None:
    """`rollout` takes the family's published settings, and what is given wins."""
    locate = box(0, 0, 2, 2)
    response = unidiff.rollout(pictured, parts(pictured), locate=locate, max_rounds=1, image_steps=3, text_block=None)
    assert response.settings.image_steps == 3 and response.settings.text_temperature == 0
    published = {k: v for k, v in pictured.spec.sampler.items() if k not in ("image_steps", "text_block")}
    assert all(getattr(response.settings, name) == value for name, value in published.items())


def test_approximate_caches_cost_less(any_model: UnifiedModel) -> None:
    settings: dict[str, Any] = {"text_threshold": None, "text_steps": 8, "text_block": 4, "greedy": True}
    cost = {
        kind: sum(r.compute["text"].token_forwards for r in sample(any_model, approximate_cache=kind, **settings))
        for kind in ("none", "prefix", "dual")
    }
    assert cost["dual"] < cost["prefix"] < cost["none"]


@pytest.mark.parametrize("settings", [{}, GUIDED], ids=["plain", "guided"])
def test_the_count_of_full_regeneration_is_the_meter_s(pictured: UnifiedModel, settings: dict[str, Any]) -> None:
    for rollout in sample(pictured, edit="full", **settings):
        counted = full_regeneration(pictured, rollout)
        if not any(s.modality is Modality.IMAGE for s in rollout.segments):
            assert counted == {}  # there is nothing to compare
            continue
        for name in ("forwards", "token_forwards", "flops"):
            assert getattr(counted.total, name) == pytest.approx(getattr(rollout.compute.total, name))


# ---------------------------------------------------------------- golden texts


@pytest.mark.parametrize("name", ["sampler_llada", "sampler_fast"])
def test_golden_texts(name: str, tmp_path: Path) -> None:
    """Token for token, and step for step, LLaDA's sampler and Fast-dLLM's caches and threshold."""
    golden = json.loads((DATA / f"{name}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(golden["config"]))
    drawn = {k["name"]: formula(golden["salt"], k["name"], k["shape"], k["scale"], k["shift"]) for k in golden["keys"]}
    write_weights(tmp_path, drawn)
    body = load_backbone(tmp_path)
    assert len(golden["cases"]) >= 11
    for case in golden["cases"]:
        done = complete(
            body,
            [golden["prompt_ids"]],
            case["gen_length"],
            case["steps"],
            case["block_length"],
            guidance=case.get("cfg_scale", 0.0),
            threshold=case.get("threshold"),
            cache=case.get("cache", "none"),
        )
        assert golden["prompt_ids"] + done.ids[0].tolist() == case["final_ids"]
        assert done.step[0].tolist() == case.get("commit_step", case.get("commit_forward"))
        if "reference_forwards" in case:
            assert int(done.forwards) <= case["reference_forwards"]


WRONG_ARGUMENTS = [
    ({"length": 0}, "length is 0; it must be at least 1"),
    ({"block": 0}, "block is 0; it must be at least 1"),
    ({"steps": -8}, "steps is -8; it must be at least 1"),
    ({"length": 8.5}, r"length is 8\.5; it must be a whole number"),
    ({"block": True}, "block is True; it must be a whole number"),
    ({"threshold": float("nan")}, "threshold is nan; it must be a finite number"),
    ({"guidance": "2"}, "guidance is '2'; it must be a number"),
    ({"guidance": -1.0}, r"guidance is -1\.0; it must be a number that is not negative"),
    ({"cache": "prefixx"}, "cache is 'prefixx'; choose one of none, prefix, dual, delayed; did you mean 'prefix'"),
    ({"text_end": 3}, "text_end is 3; it must be a list"),
    ({"text_end": [-1]}, "text_end"),
    ({"prompts": "find"}, "prompts is 'find'; it must be a list"),
    ({"prompts": ["find"]}, "prompts is 'find'; it must be a list"),
    ({"prompts": [[1.5]]}, r"prompts is 1\.5; it must be a whole number"),
]


def test_completions_in_a_batch(tmp_path: Path) -> None:
    body = load_backbone(make_checkpoint("llada", tmp_path))
    rows = [[20, 21, 22], [23], [20, 25, 26, 21, 22]]
    together = complete(body, rows, 8, 8, 4, cache="prefix")
    for row, ids in zip(rows, together.ids):
        assert torch.equal(complete(body, torch.tensor([row]), 8, 8, 4, cache="prefix").ids[0], ids)
    end = int(together.ids[0, 2])
    stopped = complete(body, rows[:1], 8, 8, 8, text_end=[end])
    assert int(stopped.ids[0].eq(end).sum()) == 1 or end not in stopped.ids[0]
    with pytest.raises(ValueError, match="7 steps and blocks of 4 do not divide 8 tokens evenly"):
        complete(body, rows, 8, 7, 4)
    for arguments, message in WRONG_ARGUMENTS:
        with pytest.raises(ValueError, match=message):
            complete(body, **{"prompts": rows, "length": 8, "steps": 8, "block": 4, **arguments})


def test_the_random_state_is_untouched(rng_untouched: None, tmp_path: Path) -> None:
    """No call moves the global random state (invariant 6), cached or guided."""
    model = drawing(UnifiedModel.from_pretrained(make_checkpoint("dimoo", tmp_path)))
    sample(model, approximate_cache="dual", text_block=4, **GUIDED)
