"""Rollouts: what is recorded is what scoring finds, edits stay inside their mask, and no row knows of the others.

Their texts, and how they end: test_rollout_texts.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

import unidiff
from tests.covering import pairs, slow_after
from tests.tables import each
from unidiff import noise
from unidiff.model import UnifiedModel
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.edit import EDITS, Locate, box
from unidiff.sampling.rollout import Rollout
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.sequence import Interleaved, Modality, Segment
from unidiff.tasks import FrozenLake

Sample = Callable[..., list[Rollout]]
Lean = Callable[[UnifiedModel, dict[int, float]], UnifiedModel]
# Every option at least once, and each edit with each image sampler.
SETTINGS: list[dict[str, Any]] = [
    {"edit": edit, "image_sampler": sampler, **text}
    for (edit, sampler), text in zip(
        itertools.product(EDITS, ("maskgit", "emerge")),
        [
            {},
            {"text_threshold": 0.3, "text_block": 3},
            {"text_threshold": None, "text_order": "margin", "text_steps": 3},
            {"text_threshold": None, "text_order": "entropy", "text_block": 4},
            {"text_threshold": None, "text_order": "random", "text_temperature": 1.7, "image_temperature": 0.8},
            {"greedy": True, "image_schedule": "linear"},
            {"text_threshold": None, "text_order": "confidence", "text_steps": 8, "image_noise": 0.0},
            {"text_threshold": 0.0, "image_steps": 5, "text_gap": 3},
        ],
    )
]
ALL = pytest.mark.parametrize("settings", slow_after(4, SETTINGS), ids=lambda s: f"{s['edit']}-{s['image_sampler']}")


def texts(rollouts: list[Rollout]) -> list[Segment]:
    return [s for r in rollouts for s in r.segments if s.modality is Modality.TEXT]


def images(rollouts: list[Rollout]) -> list[Segment]:
    return [s for r in rollouts for s in r.segments if s.modality is Modality.IMAGE]


def same(a: Rollout, b: Rollout) -> bool:
    """Bit-identical tokens, steps and edit masks, and the same end; probabilities up to rounding."""
    if a.stop is not b.stop or len(a.sequence) != len(b.sequence):
        return False
    for x, y in zip(a.segments, b.segments):
        fields = [(x.tokens, y.tokens), (x.step, y.step), (x.edited, y.edited)]
        if any((p is None) != (q is None) or (p is not None and not torch.equal(p, q)) for p, q in fields):
            return False
        if (x.probability - y.probability).abs().max() > 1e-5:
            return False
    return True


# ---------------------------------------------------------------- sampling and scoring agree


def recorded_less_scored(model: UnifiedModel, rollout: Rollout, step: int) -> torch.Tensor:
    """Of the tokens committed in a step of their segment: recorded probability less what score finds with them and
    all later ones masked."""
    canvas = model.render([rollout.sequence])
    at = torch.full(canvas.shape, -1)
    recorded = torch.ones(canvas.shape)
    for s, segment in enumerate(rollout.sequence):
        if not segment.prompt:
            inside = (canvas.segment == s) & (canvas.clean.offset >= 0)
            at[inside], recorded[inside] = segment.step.long(), segment.probability
    settings = rollout.settings
    temperature = settings.text_temperature, settings.image_temperature
    scored = model.score(canvas, canvas.sampled & (at >= step), temperature=temperature).detach().exp()
    return (recorded - scored)[canvas.sampled & (at == step)]


@pytest.mark.parametrize(("edit", "temperature"), [*zip(EDITS, (1.0, 0.6, 1.8, 0.6)), ("confidence", 1.8)])
def test_probabilities_of_one_step_are_scores(
    edit: str, temperature: float, model: UnifiedModel, sample: Sample
) -> None:
    """Invariant 1, between sampling and scoring: everything drawn in one step, so everything masked."""
    settings = {"text_temperature": temperature, "image_temperature": temperature, "edit_share": 0.3}
    for rollout in sample(edit=edit, image_steps=1, text_threshold=None, text_steps=1, **settings):
        error = recorded_less_scored(model, rollout, 0)
        assert len(error) == sum(int(s.sampled.sum()) for s in rollout.segments) and error.abs().max() < 1e-5


@pytest.mark.parametrize(("threshold", "temperature"), [(0.5, 0.6), (None, 1.0), (0.5, 1.8), (None, 1.8)])
def test_first_tokens_are_scored_with_everything_masked(
    threshold: float | None, temperature: float, model: UnifiedModel, sample: Sample
) -> None:
    settings = {"text_threshold": threshold, "text_temperature": temperature, "image_temperature": temperature}
    errors = [recorded_less_scored(model, rollout, 0).abs() for rollout in sample(edit="random", **settings)]
    # A row may have none: a token of the first step is cut off where the text later ends before it.
    assert sum(map(len, errors)) > 10 and torch.cat(errors).max() < 1e-5


@pytest.mark.parametrize(
    ("which", "edit", "sampler"), pairs(("model", "plain_model"), ("region", "full"), ("maskgit", "emerge"))
)
def test_every_step_is_scored_as_it_was_sampled(
    which: str, edit: str, sampler: str, sample: Sample, request: pytest.FixtureRequest
) -> None:
    """Texts written from left to right, a token a step; images by their step map: each token in the state in which it
    was drawn."""
    model = request.getfixturevalue(which)
    settings = {"text_block": 1, "text_temperature": 0.8, "image_temperature": 1.3}
    for rollout in sample(of=model, edit=edit, image_sampler=sampler, image_steps=4, **settings):
        for text in texts([rollout]):
            assert text.step.tolist() == list(range(len(text)))
        for step in range(8):
            error = recorded_less_scored(model, rollout, step)
            assert not len(error) or error.abs().max() < 1e-5


# ---------------------------------------------------------------- edits


@pytest.mark.parametrize(
    ("edit", "sampler", "steps", "share"),
    pairs(("region", "confidence", "random"), ("maskgit", "emerge"), (1, 5, 16), (0.05, 0.5)),
)
def test_tokens_outside_an_edit_are_the_image_before(
    edit: str, sampler: str, steps: int, share: float, prompts: list[Interleaved], sample: Sample
) -> None:
    """Invariant 3."""
    rollouts = sample(prompts * 2, range(8), edit=edit, image_sampler=sampler, image_steps=steps, edit_share=share)
    changed = 0
    for rollout in rollouts:
        before = rollout.sequence.prompt.last_image()
        for segment in images([rollout]):
            assert segment.edited is not None and segment.edited.dtype == torch.bool
            assert torch.equal(segment.tokens[~segment.edited], before.tokens[~segment.edited])
            assert (segment.step[~segment.edited] == -1).all() and (segment.probability[~segment.edited] == 1).all()
            assert (segment.step[segment.edited] >= 0).all() and (segment.probability[segment.edited] < 1).all()
            changed += int((segment.tokens != before.tokens).sum())
            before = segment
    assert changed


def test_full_regenerates_everything(sample: Sample) -> None:
    for segment in images(sample(edit="full")):
        assert segment.edited is None and segment.sampled.all() and (segment.step >= 0).all()


SHARES = [("random", 0.125), ("confidence", 0.125), ("random", 0.4), ("full", 1.0)]


@pytest.mark.parametrize(("chosen", "steps", "sampler"), pairs(SHARES, (1, 4, 12), ("maskgit", "emerge")))
def test_steps_scale_with_the_edit(chosen: tuple[str, float], steps: int, sampler: str, sample: Sample) -> None:
    edit, share = chosen
    for segment in images(sample(edit=edit, edit_share=share, image_steps=steps, image_sampler=sampler)):
        count = int(segment.sampled.sum())
        assert count == round(share * 64)
        planned = max(1, -(-steps * count // 64))
        taken = segment.step[segment.sampled].unique().tolist()
        assert max(taken) < planned
        if sampler == "maskgit":
            assert taken == list(range(planned))


def test_regions_are_what_the_text_names(
    model: UnifiedModel, prompts: list[Interleaved], locate: Locate, sample: Sample
) -> None:
    counts = set()
    for rollout in sample(prompts * 2, range(8), edit="region"):
        for text, image in itertools.pairwise(rollout.segments):
            if image.modality is Modality.IMAGE:
                named = torch.from_numpy(locate(model.decode_text(text.tokens), image.grid)).flatten()
                assert torch.equal(image.edited, named)
                counts.add(int(named.sum()))
    assert len(counts) > 3 and 0 in counts


def test_a_user_can_give_a_box(model: UnifiedModel, prompts: list[Interleaved]) -> None:
    sampler = InterleavedSampler(model, SamplerConfig(max_rounds=1), box(2, 3, 4, 8))
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:4, 3:8] = True
    found = images(sampler.sample(prompts, range(4)))
    assert found and all(torch.equal(s.edited, inside.flatten()) for s in found)


def test_confidence_picks_the_least_likely_tokens_of_the_copy(model: UnifiedModel, sample: Sample) -> None:
    shared, limited = (sample(edit="confidence", **s) for s in ({"edit_share": 0.25}, {"edit_threshold": 0.02}))
    for rollouts in (shared, limited):
        for rollout in rollouts:
            if len(rollout.segments) < 2:
                continue
            text, image = rollout.segments[:2]
            copy = Segment(Modality.IMAGE, rollout.sequence.prompt.last_image().tokens, grid=image.grid)
            canvas = model.render([Interleaved([*rollout.sequence.prompt, text, copy])])
            place = canvas.sampled & (canvas.modality == Modality.IMAGE)
            probability = model.score(canvas, place).detach().exp()[place]
            if rollouts is shared:
                assert image.edited.sum() == 16
                assert probability[image.edited].max() <= probability[~image.edited].min() + 1e-6
            else:
                assert torch.equal(image.edited, probability < 0.02)


# ---------------------------------------------------------------- rows are on their own


@ALL
def test_a_row_is_the_same_in_any_batch(settings: dict[str, Any], prompts: list[Interleaved], sample: Sample) -> None:
    """Invariant 4: alone, in another order, among others, with prompts of other lengths beside it."""
    rows = prompts * 2
    keys = [noise.key(7, i) for i in range(len(rows))]
    together = sample(rows, keys, **settings)
    assert len({len(r.sequence) for r in together}) > 1 or "greedy" in settings
    assert [r.key for r in together] == keys
    for batch in ([0], [5], [7, 2, 4], [6, 5, 4, 3, 2, 1, 0, 7]):
        for i, rollout in zip(batch, sample([rows[i] for i in batch], [keys[i] for i in batch], **settings)):
            assert same(rollout, together[i]), f"row {i} in batch {batch}"


def test_samples_of_one_prompt(prompts: list[Interleaved], sample: Sample) -> None:
    keys = list(range(8))
    group = sample(prompts[:2], keys)
    spread = sample([prompts[i // 4] for i in range(8)], keys)
    assert all(same(a, b) for a, b in zip(group, spread))
    assert all(r.sequence[: len(p)] == p for r, p in zip(group, [prompts[0]] * 4 + [prompts[1]] * 4))
    assert not same(group[0], group[1])


@ALL
def test_a_cache_changes_nothing(settings: dict[str, Any], prompts: list[Interleaved], sample: Sample) -> None:
    """Invariant 5."""
    rows, keys = prompts * 2, range(8)
    for a, b in zip(sample(rows, keys, **settings), sample(rows, keys, cache=False, **settings)):
        assert same(a, b)


def test_rotary_positions_know_no_padding(
    plain_model: UnifiedModel, prompts: list[Interleaved], sample: Sample
) -> None:
    """Invariants 4 and 5, of a model that tells places by positions alone."""
    rows, keys, settings = prompts * 2, list(range(8)), {"of": plain_model, "edit": "random", "edit_share": 0.3}
    together = sample(rows, keys, **settings)
    assert sum(len(r.segments) > 1 for r in together) > 3
    for a, b in zip(together, sample(rows, keys, cache=False, **settings)):
        assert same(a, b)
    for i, rollout in enumerate(together):
        assert same(rollout, sample([rows[i]], [keys[i]], **settings)[0])


@ALL
def test_global_random_state_stays(settings: dict[str, Any], rng_untouched: None, sample: Sample) -> None:
    """Invariant 6."""
    sample(**settings)


def test_sampling_does_not_depend_on_the_global_random_state(sample: Sample) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = sample()
        torch.manual_seed(2)
        assert all(same(a, b) for a, b in zip(first, sample()))


def test_the_mode_of_the_model_is_kept(build_model: Callable[..., UnifiedModel], sample: Sample) -> None:
    model = build_model(seed=4)
    for training in (True, False):
        model.train(training)
        rollouts = sample(of=model)
        assert model.training is training and not any(s.probability.requires_grad for s in texts(rollouts))


def test_rows_that_finish_leave_the_batch(
    model: UnifiedModel, prompts: list[Interleaved], sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, read = [], UnifiedModel.read

    def spy(self: UnifiedModel, context: Any, block: Any, *part: Any) -> torch.Tensor:
        sizes.append(block.shape[0])
        return read(self, context, block, *part)

    monkeypatch.setattr(UnifiedModel, "read", spy)
    rollouts = sample(prompts * 2, range(8), max_rounds=3)
    counted = sum(c.forwards for r in rollouts for phase, c in r.compute.items() if phase != "prompt")
    assert sum(sizes[1:]) == counted and len(set(sizes)) > 2  # the first one reads the prompts


# ---------------------------------------------------------------- prompts of other kinds


def test_rollouts_carry_what_they_were_made_with(prompts: list[Interleaved], sample: Sample) -> None:
    keys = [5, -7, 1 << 62, 0]
    rollouts = sample(prompts, keys, edit_share=0.3, edit="random")
    assert [r.key for r in rollouts] == keys and rollouts[0].settings.edit_share == 0.3
    for rollout, prompt in zip(rollouts, prompts):
        assert rollout.sequence.prompt == prompt and not any(s.prompt for s in rollout.segments)
        for segment in rollout.segments:
            assert segment.step.dtype == torch.int32 and segment.probability.dtype == torch.float32
            assert (
                segment.tokens.dtype == torch.int64 and ((segment.probability > 0) & (segment.probability <= 1)).all()
            )


@pytest.mark.parametrize("edit", EDITS)
def test_prompts_without_an_image(
    edit: str, model: UnifiedModel, lean: Lean, prompts: list[Interleaved], sample: Sample
) -> None:
    talkative = lean(model, {model.spec.image_next: 8.0})
    rows = [prompts[0], Interleaved(prompts[1][:1]), prompts[2], Interleaved(prompts[3][:1])]
    mixed = sample(rows, range(4), of=talkative, edit=edit)
    for i, rollout in enumerate(mixed):
        (alone,) = sample([rows[i]], [i], of=talkative, edit=edit)
        assert same(rollout, alone)
        first, second = images([rollout])
        assert first.grid == second.grid == model.spec.image_grid
        assert (first.edited is None) == (i % 2 == 1 or edit == "full") and (second.edited is None) == (edit == "full")
        assert (recorded_less_scored(talkative, rollout, 0).abs() < 1e-5).all()
    for a, b in zip(mixed, sample(rows, range(4), of=talkative, edit=edit, cache=False)):
        assert same(a, b)


def test_empty_prompts(sample: Sample) -> None:
    a, b = sample([Interleaved()], [3], edit="full"), sample([Interleaved()], [3], edit="full", cache=False)
    assert same(a[0], b[0]) and a[0].sequence.prompt == ()


def test_a_task_from_end_to_end(model: UnifiedModel, lean: Lean, task: FrozenLake) -> None:
    sampler = InterleavedSampler(lean(model, {model.spec.image_next: 8.0}), SamplerConfig(max_rounds=1), task.region)
    examples = [task.example("test", i) for i in range(2)]
    for rollout, example in zip(sampler.sample([model.encode(e.prompt) for e in examples], range(2)), examples):
        assert [type(p) for p in model.decode(rollout.sequence)] == [str, Image.Image, str, Image.Image, str]
        image = rollout.segments[1]
        named = task.region(model.decode_text(rollout.segments[0].tokens), image.grid)
        assert image.edited.reshape(8, 8).tolist() == named.tolist() and example.board.size == 4


def test_one_prompt_in_one_call(model: UnifiedModel, task: FrozenLake) -> None:
    question, picture = task.example("test", 0).prompt
    response = unidiff.rollout(model, [question, picture], edit="confidence", seed=3, max_rounds=1)
    sampler = InterleavedSampler(model, SamplerConfig(edit="confidence", max_rounds=1))
    assert same(response, sampler.sample([model.encode([question, picture])], [noise.key(3)])[0])
    region = unidiff.rollout(model, [question, picture], locate=task.region, seed=3, max_rounds=1)
    assert region.settings.edit == "region"


# ---------------------------------------------------------------- errors


WRONG_SETTINGS: list[tuple[str, object, str]] = [
    ("text_order", "best", r"text_order is 'best'; choose one of confidence, margin, entropy, random, dilated"),
    ("edit", "some", r"edit is 'some'; choose one of region, confidence, random, full"),
    ("image_sampler", "x", r"image_sampler is 'x'; choose one of maskgit, emerge"),
    ("image_schedule", "x", r"image_schedule is 'x'; choose one of"),
    ("text_steps", 0, r"text_steps is 0; it must be at least 1"),
    ("image_steps", 0, r"image_steps is 0"),
    ("max_rounds", 0, r"max_rounds is 0"),
    ("text_block", 0, r"text_block is 0; it must be at least 1, or None"),
    ("text_temperature", -1.0, r"text_temperature is -1\.0; it must be a number that is not negative"),
    ("image_guidance", -1.0, r"image_guidance is -1\.0; it must be a number that is not negative"),
    ("image_temperature", 0.0, r"image_temperature is 0\.0; it must be above 0 \(use greedy"),
    ("image_temperature", -1.0, r"image_temperature is -1\.0"),
    ("image_noise", -0.1, r"image_noise is -0\.1; it must be a number that is not negative"),
    ("image_temperature", float("nan"), "image_temperature is nan; it must be a finite number"),
    ("image_noise", float("nan"), "image_noise is nan; it must be a finite number"),
    ("image_noise", float("inf"), "image_noise is inf; it must be a finite number"),
    ("text_threshold", float("nan"), "text_threshold is nan; it must be a finite number"),
    ("greedy", "no", "greedy is 'no'; it must be true or false"),
    ("cache", 1, "cache is 1; it must be true or false"),
    ("text_steps", 2.5, r"text_steps is 2\.5; it must be a whole number"),
    ("text_steps", True, "text_steps is True; it must be a whole number"),
    ("text_block", "32", "text_block is '32'; it must be a whole number"),
    ("max_rounds", None, "max_rounds is None; it must be a whole number"),
    ("edit", "Region", "edit is 'Region'; choose one of region, .*; did you mean 'region'"),
    ("edit_share", 0.0, r"edit_share is 0\.0; it must be in \(0, 1\]"),
    ("edit_share", 1.1, r"edit_share is 1\.1"),
    ("text_threshold", 1.5, r"text_threshold is 1\.5; a probability is in \[0, 1\]"),
    ("edit_threshold", -0.5, r"edit_threshold is -0\.5"),
    ("text_entropy_bound", -0.1, r"text_entropy_bound is -0\.1; it must not be negative, or None"),
    ("text_gap", 0, r"text_gap is 0; it must be at least 1"),
]


def test_wrong_settings_are_named() -> None:
    for field, value, message in WRONG_SETTINGS:
        with pytest.raises(ValueError, match=message):
            SamplerConfig(**{field: value})


def test_region_without_a_way_to_find_it_is_confidence(model: UnifiedModel, prompts: list[Interleaved]) -> None:
    sampled = [
        InterleavedSampler(model, SamplerConfig(edit=edit)).sample(prompts, range(8))
        for edit in ("region", "confidence")
    ]
    for one, other in zip(*sampled):
        assert [s.tokens.tolist() for s in one.segments] == [s.tokens.tolist() for s in other.segments]


def test_an_approximate_cache_is_for_bidirectional_models(model: UnifiedModel) -> None:
    with pytest.raises(ValueError, match="approximate_cache is 'dual', but the model is block_causal"):
        InterleavedSampler(model, SamplerConfig(edit="full", approximate_cache="dual"))


@each(("rows", "keys"), [(2, 3), (3, 2), (2, 0), (0, 2)])
def test_keys_have_to_fit(rows: int, keys: int, model: UnifiedModel, prompts: list[Interleaved]) -> None:
    sampler = InterleavedSampler(model, SamplerConfig(edit="full"))
    with pytest.raises(ValueError, match=f"{keys} keys do not fit {rows} prompts"):
        sampler.sample(prompts[:rows], range(keys))


def test_prompts_that_leave_no_room_are_refused(model: UnifiedModel, prompts: list[Interleaved]) -> None:
    sampler = InterleavedSampler(model, SamplerConfig(edit="full", max_rounds=12))
    with pytest.raises(ValueError, match=r"prompts of 74 tokens and 12 rounds need 970 positions|need \d+ positions"):
        sampler.sample([Interleaved([*prompts[0], *prompts[0][1:] * 2])], [0])


def test_regions_of_another_shape_are_named(model: UnifiedModel, lean: Lean, prompts: list[Interleaved]) -> None:
    sampler = InterleavedSampler(lean(model, {model.spec.image_next: 60.0}), SamplerConfig(), box(0, 0, 9, 9))
    with pytest.raises(ValueError, match=r"does not fit a grid of \(8, 8\)"):
        sampler.sample(prompts[:1], [0])
