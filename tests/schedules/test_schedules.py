"""Schedules: their log-probabilities, what they do to rollouts, and that what is scored is what was drawn."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tables import each
from unidiff import UnifiedModel, noise
from unidiff.estimators import draw_views, make, run_views, values_of
from unidiff.rewards.table import RewardTable
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.rollout import Rollout
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.schedules import SCHEDULES, Choice, Look, Schedule, make_schedule, register_schedule
from unidiff.schedules.speed import slowness, with_speed
from unidiff.sequence import Modality, Segment

Sample = Callable[..., list[Rollout]]
NAMES = tuple(SCHEDULES)
# Numbers that make new schedules decide something else in every step.
SHAKEN = 1.5


def shaken(name: str, seed: int = 0) -> Schedule:
    """A schedule with parameters that are far from its first ones."""
    schedule = make_schedule(name, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in schedule.parameters():
            p += SHAKEN * torch.randn(p.shape, generator=generator) / max(p.shape[-1], 1) ** 0.5
    return schedule


@pytest.fixture(scope="module")
def endless(model: UnifiedModel, lean: Callable[..., UnifiedModel]) -> UnifiedModel:
    """A model that never ends a text, so that a replay sees what the rollout saw."""
    return lean(model, dict.fromkeys(model.spec.text_end, -60.0))


@pytest.fixture
def steered(endless: UnifiedModel) -> Iterator[Callable[[str | None], UnifiedModel]]:
    def of(name: str | None) -> UnifiedModel:
        endless.schedule = None if name is None else shaken(name)
        return endless

    yield of
    endless.schedule = None


def look(masked: list[list[bool]], seed: int = 0, modality: Modality = Modality.TEXT) -> Look:
    mask = torch.tensor(masked)
    logits = torch.randn(*mask.shape, 5, generator=torch.Generator().manual_seed(seed))
    total = torch.full((len(mask),), mask.shape[1])
    return Look(modality, torch.linspace(0, 0.9, len(mask)), mask, total, (2 * logits).log_softmax(-1))


def drawn(rollout: Rollout) -> list[tuple[list[int], list[int]]]:
    return [(s.tokens.tolist(), s.step.tolist()) for s in rollout.segments]


def segments(rollouts: list[Rollout], modality: Modality) -> list[Segment]:
    return [s for r in rollouts for s in r.segments if s.modality is modality]


# ---------------------------------------------------------------- probabilities


def test_the_planners_actions_have_probabilities_that_sum_to_1() -> None:
    """By enumeration, and they are drawn as often; what is not masked is never chosen."""
    schedule = shaken("planner")
    seen = look([[True, False, True, True]])
    features = schedule.features(seen)
    every = [torch.tensor([[a, 0.0, b, c]]) for a, b, c in itertools.product((0.0, 1.0), repeat=3)]
    probability = torch.cat([schedule.log_prob(features, action) for action in every]).exp().detach()
    assert probability.sum().item() == pytest.approx(1, abs=1e-6) and probability.min() > 1e-3
    keys = torch.tensor([noise.key(3, i) for i in range(20000)])
    found = schedule.draw(features.expand(20000, -1), lambda n: noise.uniform(keys, (9,), n))
    assert not found[:, 1].any()
    which = (found[:, [0, 2, 3]] * torch.tensor([4, 2, 1])).sum(1).long().bincount(minlength=8) / 20000
    assert torch.allclose(which, probability, atol=0.015)
    likeliest = schedule.draw(features, None)
    assert torch.equal(likeliest, every[int(probability.argmax())])


@pytest.mark.parametrize("name", ["controls", "bound"])
def test_gaussian_actions_are_drawn_from_their_density(name: str) -> None:
    schedule = shaken(name)
    seen = look([[True, True, False, True]])
    features = schedule.features(seen)
    keys = torch.tensor([noise.key(5, i) for i in range(20000)])
    found = schedule.draw(features.expand(20000, -1), lambda n: noise.uniform(keys, (9,), n)).detach()
    mean = schedule.draw(features, None).detach()[0]
    assert torch.allclose(found.mean(0), mean, atol=4 * float(found.std(0).max()) / 20000**0.5)
    logp = schedule.log_prob(features.expand(20000, -1), found).detach()
    normal = torch.distributions.Independent(torch.distributions.Normal(mean, found.std(0)), 1)
    assert (logp - normal.log_prob(found)).abs().mean() < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    schedule = shaken(name).double()
    features = schedule.features(look([[True, True, False], [True, True, True]])).double()
    keys = torch.tensor([1, 2])
    action = schedule.draw(features, lambda n: noise.uniform(keys, (9,), n)).double().detach()
    parameters = list(schedule.parameters())

    def value(*changed: Tensor) -> Tensor:
        names = [k for k, _ in schedule.named_parameters()]
        return torch.func.functional_call(
            _LogProb(schedule), {f"of.{k}": p for k, p in zip(names, changed)}, (features, action)
        )

    assert torch.autograd.gradcheck(value, [p.detach().requires_grad_() for p in parameters])


class _LogProb(torch.nn.Module):
    def __init__(self, of: Schedule) -> None:
        super().__init__()
        self.of = of

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        return self.of.log_prob(features, action)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_recorded_is_what_was_drawn(name: str, steered: Any, sample: Sample) -> None:
    """The ratio of an untrained schedule is 1, and what it committed adds up."""
    model = steered(name)
    rollouts = sample(of=model, edit="full", text_block=5)
    kinds = [m for m in Modality if model.schedule.steers(m)]
    for kind in kinds:
        for segment in segments(rollouts, kind):
            choices = segment.choices
            assert choices is not None and int(choices.committed.sum()) == len(segment)
            assert len(choices) == int(segment.step.max()) + 1
            logp = model.schedule.log_prob(choices.features, choices.action) * choices.fresh
            assert torch.allclose(logp, choices.log_prob, atol=1e-6)
            assert bool(choices.fresh.all()) != model.schedule.once
    assert all(s.choices is None for k in set(Modality) - set(kinds) for s in segments(rollouts, k))


# ---------------------------------------------------------------- rollouts


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampler", ["maskgit", "emerge"])
def test_every_token_is_scored_as_it_was_drawn(name: str, sampler: str, steered: Any, sample: Sample) -> None:
    model = steered(name)
    settings: dict[str, Any] = {"text_temperature": 0.8, "image_temperature": 1.3, "image_sampler": sampler}
    rollouts = sample(of=model, edit="full", **settings)
    canvas = model.render([r.sequence for r in rollouts])
    trace = make("trace")
    (draw,) = draw_views(canvas, trace, trace, 1, torch.arange(len(rollouts)))
    base = torch.tensor([0.8, 1.3])[canvas.modality.clamp(min=0)]
    recorded, warmth = torch.zeros(canvas.shape), torch.ones(canvas.shape)
    for b, rollout in enumerate(rollouts):
        for ordinal, s in enumerate(rollout.sequence):
            if not s.prompt:
                columns = (canvas.segment[b] == ordinal) & (canvas.clean.offset[b] >= 0)
                recorded[b, columns] = s.probability.log()
                if s.warmth is not None:
                    warmth[b, columns] = s.warmth
    with torch.no_grad():
        logp = run_views(model, canvas, draw.views, base * warmth)
        plain = run_views(model, canvas, draw.views, (0.8, 1.3))
    found = values_of(canvas, draw, logp, trace, trace, torch.ones(canvas.shape))
    assert (found - recorded)[canvas.sampled].abs().max() < 1e-4
    if name == "controls":
        assert warmth.min() < 0.9 and warmth.max() > 1.1
        assert (logp - plain).abs().max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_same_in_any_batch(name: str, steered: Any, sample: Sample, prompts: list[Any]) -> None:
    model, keys = steered(name), [noise.key(1, i) for i in range(6)]
    rows = [prompts[i % len(prompts)] for i in range(6)]
    together = sample(rows, keys, of=model, edit="random", edit_share=0.4, text_block=5)
    for i, rollout in enumerate(together):
        (alone,) = sample([rows[i]], [keys[i]], of=model, edit="random", edit_share=0.4, text_block=5)
        assert drawn(alone) == drawn(rollout)
        for a, b in zip(alone.segments, rollout.segments):
            if a.choices is not None:
                assert b.choices is not None
                assert torch.allclose(a.choices.log_prob, b.choices.log_prob, atol=1e-5)
                assert torch.equal(a.choices.committed, b.choices.committed)


def test_greedy_schedules_need_no_key(steered: Any, sample: Sample, prompts: list[Any]) -> None:
    for name in NAMES:
        model = steered(name)
        a, b = (sample(prompts, keys, of=model, greedy=True, edit="full") for keys in (range(4), range(50, 54)))
        assert [*map(drawn, a)] == [*map(drawn, b)]


def test_a_share_of_nearly_everything_takes_one_step(endless: UnifiedModel, sample: Sample) -> None:
    """And a small one as many as there are tokens."""
    try:
        for share, steps in ((0.999, 1), (0.001, 8)):
            endless.schedule = make_schedule(f"controls:share={share}:temperature=no")
            assert {int(s.step.max()) + 1 for s in segments(sample(of=endless), Modality.TEXT)} == {steps}
        endless.schedule = make_schedule("bound:start=1000")
        assert {int(s.step.max()) for s in segments(sample(of=endless), Modality.TEXT)} == {0}
        endless.schedule = make_schedule("planner:share=0.999999")
        assert {int(s.step.max()) for s in segments(sample(of=endless, greedy=True), Modality.TEXT)} == {0}
        endless.schedule = make_schedule("planner:share=0.0001")
        assert {int(s.step.max()) for s in segments(sample(of=endless, greedy=True), Modality.TEXT)} == {7}
    finally:
        endless.schedule = None


def test_what_a_schedule_leaves_to_the_settings(endless: UnifiedModel, sample: Sample) -> None:
    plain = sample(of=endless, edit="full")
    try:
        endless.schedule = make_schedule("controls:texts=no")
        texts = segments(sample(of=endless, edit="full"), Modality.TEXT)
        assert [s.step.tolist() for s in texts] == [s.step.tolist() for s in segments(plain, Modality.TEXT)]
    finally:
        endless.schedule = None


# ---------------------------------------------------------------- saving, names


@pytest.mark.parametrize("name", [*NAMES, "controls:temperature=no:share=0.5"])
def test_a_schedule_is_saved_with_the_model(name: str, model: UnifiedModel, tmp_path: Path) -> None:
    own = copy.deepcopy(model)
    own.schedule = shaken(name)
    own.save_pretrained(tmp_path)
    again = UnifiedModel.from_pretrained(tmp_path)
    assert again.schedule is not None and type(again.schedule) is type(own.schedule)
    assert again.schedule.options == own.schedule.options
    for (k, a), (_, b) in zip(own.schedule.state_dict().items(), again.schedule.state_dict().items(), strict=True):
        assert torch.equal(a, b), k
    assert not {p.data_ptr() for p in again.parameters()} & {p.data_ptr() for p in again.schedule.parameters()}
    own.schedule = None
    own.save_pretrained(tmp_path)
    assert UnifiedModel.from_pretrained(tmp_path).schedule is None


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"name": "os:system", "options": {}}, "schedule 'os:system' is not known; import the module that registers"),
        ({"name": "controls", "options": {"speed": 3}}, "unexpected keyword argument 'speed'"),
        ({"name": "planner", "options": {}}, "Missing key|Unexpected key"),
        ([1], "schedule None is not known"),
    ],
)
def test_a_damaged_schedule_is_named(about: Any, message: str, model: UnifiedModel, tmp_path: Path) -> None:
    own = copy.deepcopy(model)
    own.schedule = make_schedule("controls")
    own.save_pretrained(tmp_path)
    (tmp_path / "schedule.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=message):
        UnifiedModel.from_pretrained(tmp_path)


@each(
    ("text", "message"),
    [
        ("control", "schedule 'control' is not known; did you mean 'controls'"),
        ("controls:speed=3", "schedule 'controls' has no option 'speed'"),
        ("controls:share=2", r"share is 2\.0; it must be in \(0, 1\)"),
        ("controls:share=fast", "schedule controls: share is 'fast'"),
        ("controls:temperature=no:count=no", "it decides nothing"),
        ("controls:texts=no:pictures=no", "it steers nothing"),
        ("planner:hidden=0", "hidden is 0; it must be at least 1"),
        ("math:sqrt", "math:sqrt is not a registered schedule"),
        ("bound:start=0", r"start is 0\.0; it must be above 0"),
        ("no_module:name", "No module named 'no_module'"),
    ],
)
def test_wrong_names_and_options(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(text)


def test_a_plugin(endless: UnifiedModel, sample: Sample) -> None:
    @register_schedule("two_by_two")
    class TwoByTwo(Schedule):
        def features(self, look: Look) -> Tensor:
            return look.left[:, None]

        def draw(self, features: Tensor, uniform: Any) -> Tensor:
            return torch.zeros(len(features), 1)

        def log_prob(self, features: Tensor, action: Tensor) -> Tensor:
            return torch.zeros(len(features))

        def choice(self, look: Look, action: Tensor) -> Choice:
            return Choice(count=torch.full((len(action),), 2))

    try:
        endless.schedule = make_schedule("two_by_two")
        for s in segments(sample(of=endless), Modality.TEXT):
            assert s.step.long().bincount().tolist() == [2, 2, 2, 2]
    finally:
        endless.schedule = None
        del SCHEDULES["two_by_two"]
    with pytest.raises(TypeError, match="must be a class derived"):
        register_schedule("x")(int)  # type: ignore[type-var]


@pytest.mark.slow
def test_small_edits_act_alike_beside_wide_ones(model: UnifiedModel, prompts: list[Any], locate: Any) -> None:
    """A picture's edit may be padded to a wider one's: what a schedule sees of it does not change."""
    model = copy.deepcopy(model)
    for name in NAMES:
        model.schedule = shaken(name)
        sampler = InterleavedSampler(model, SamplerConfig(edit="region", image_steps=16, max_rounds=2), locate)
        rows, keys = [prompts[i % len(prompts)] for i in range(8)], [noise.key(2, i) for i in range(8)]
        together = sampler.sample(rows, keys)
        widths = {int(s.sampled.sum()) for s in segments(together, Modality.IMAGE)}
        assert len(widths) > 2
        for row, key, rollout in zip(rows, keys, together):
            assert drawn(sampler.sample([row], [key])[0]) == drawn(rollout)


class _Own(Schedule):
    """What a plug-in may get wrong, one thing at a time."""

    wrong = ""

    def features(self, look: Look) -> Tensor:
        return look.left[:, None]

    def draw(self, features: Tensor, uniform: Any) -> Tensor:
        return torch.zeros(len(features)) if self.wrong == "action" else torch.zeros(len(features), 1)

    def log_prob(self, features: Tensor, action: Tensor) -> Tensor:
        return action if self.wrong == "log_prob" else action.sum(1)

    def choice(self, look: Look, action: Tensor) -> Any:
        count = torch.full((len(action),), 2)
        return {
            "None": None,
            "bound": Choice(bound=action + 1.0),
            "both": Choice(count=count, bound=count.float()),
            "temperature": Choice(temperature=-count.float()),
            "nan": Choice(bound=count.float() * torch.nan),
            "commit": Choice(commit=look.masked.float()),
            "float": Choice(count=count.float()),
            "number": Choice(count=2),  # type: ignore[arg-type]
        }.get(self.wrong, Choice(count=count))


@each(
    ("wrong", "message"),
    [
        ("action", r"schedule _Own: action must be a float tensor \[4, …\]"),
        ("log_prob", r"schedule _Own: log_prob must be \[\d+\], it is \[\d+, 1\]"),
        ("None", "schedule _Own: choice must return a Choice, not NoneType"),
        ("bound", r"Choice\.bound must be a tensor \[4\]"),
        ("both", "a Choice has one of commit, count and bound, not count, bound"),
        ("temperature", r"Choice\.temperature must be above 0"),
        ("nan", r"Choice\.bound has a value that is not finite"),
        ("commit", r"Choice\.commit must be bool"),
        ("float", r"Choice\.count must be whole numbers"),
        ("number", r"Choice\.count must be a tensor \[4\]"),
    ],
)
def test_what_a_plugin_gets_wrong_is_named(endless: UnifiedModel, sample: Sample, wrong: str, message: str) -> None:
    try:
        endless.schedule = own = _Own()
        own.wrong = wrong
        with pytest.raises(ValueError, match=message):
            sample(of=endless)
    finally:
        endless.schedule = None


def test_options_are_those_that_it_was_made_with(model: UnifiedModel, tmp_path: Path) -> None:
    """However they were given; a schedule made by its class is saved like any other."""
    assert make_schedule("planner").options == make_schedule("planner:share=0.25").options
    own = copy.deepcopy(model)
    own.schedule = SCHEDULES["controls"](share=0.5)  # type: ignore[call-arg]
    own.save_pretrained(tmp_path)
    again = UnifiedModel.from_pretrained(tmp_path).schedule
    assert again is not None and again.options["share"] == 0.5 and copy.deepcopy(again).options == again.options


def test_a_gap_holds_for_schedules_too(endless: UnifiedModel, sample: Sample) -> None:
    try:
        endless.schedule = make_schedule("controls:share=0.9")
        for s in segments(sample(of=endless, text_gap=8), Modality.TEXT):
            for step in s.step.unique().tolist():
                assert ((s.step == step).nonzero()[:, 0].diff() >= 2).all()
    finally:
        endless.schedule = None


# ---------------------------------------------------------------- speed


def test_speed_is_a_factor_of_what_was_earned(model: UnifiedModel, sample: Sample) -> None:
    """Groups that are all wrong say nothing of speed; with the additive form they ask for it."""
    rollouts = sample(text_threshold=0.3, edit="random")
    slow = slowness(rollouts)
    for rollout, found in zip(rollouts, slow.tolist()):
        sampled = [s.step[s.step >= 0].tolist() for s in rollout.segments]
        sampled = [s for s in sampled if s]
        steps, tokens = sum(len(set(s)) for s in sampled), sum(map(len, sampled))
        assert found == pytest.approx((steps - len(sampled)) / (tokens - len(sampled)))
    assert 0 < slow.min() < slow.max() <= 1
    shape = (len(rollouts), 2, 1)
    kinds = torch.zeros(shape[:2], dtype=torch.int64)

    def table(values: float) -> RewardTable:
        full = torch.full(shape, values)
        full[0, 1, 0] = torch.nan
        return RewardTable(
            ("r",), (1.0,), ("text",), (("text",),), full, torch.full((len(rollouts), 1), torch.nan), kinds
        )

    right, wrong = (with_speed(table(v), rollouts, 0.5).values_BSF for v in (2.0, 0.0))
    assert torch.allclose(right[1:, 0, 0], 2 - slow[1:]) and bool(right[0, 1, 0].isnan())
    assert wrong.nan_to_num().abs().max() == 0
    assert torch.equal(
        with_speed(table(-1.0), rollouts, 0.5).values_BSF.nan_to_num(), table(-1.0).values_BSF.nan_to_num()
    )
    hacked = with_speed(table(0.0), rollouts, 0.5, adds=True).values_BSF[1:, 0, 0]
    assert torch.allclose(hacked, -0.5 * slow[1:]) and hacked.std() > 0
