"""Invariants 1, 2, 4 and 6 of the design, generated: every estimator × model (block-causal, and bidirectional ones with
and without pictures, row separators) × modality × sampling settings, in the trainer's own update. Of more than two such
axes every two values meet (tests/covering.py).

Rollouts are made by hand, with every kind of segment that is small or odd: texts of one token, edits of one, images of
which nothing was edited, rows without a picture.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unidiff.grpo.trainer as trainer_module
from tests.covering import pairs, slow_after
from tests.tables import each
from unidiff import GRPOConfig, GRPOTrainer, UnifiedModel, noise
from unidiff.canvas import Canvas
from unidiff.estimators import ESTIMATORS, Draw, draw_views, make
from unidiff.grpo.batches import MicroBatch
from unidiff.grpo.experience import Experience
from unidiff.grpo.losses import LOSSES
from unidiff.guidance import Guidance
from unidiff.sequence import Interleaved, Modality, Segment, hidden
from unidiff.tasks import FrozenLake

MODELS = ("native", "llada", "mmada", "dimoo")
WARM = {"text_temperature": 0.7, "image_temperature": 1.4}
SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {},
    "warm": WARM,
    "guided": {**WARM, "text_guidance": 1.5, "image_guidance": 0.5, "picture_guidance": 2.0},
}
ROWS = 8

# A method for one modality beside another for the other one, so that each has its own and all are paired.
PAIRS = list(zip(ESTIMATORS, [*list(ESTIMATORS)[3:], *list(ESTIMATORS)[:3]]))


def on_the_fast_model(cases: list[tuple]) -> list[Any]:
    """All of them, and those of the other models are slow."""
    ordered = sorted(cases, key=lambda case: case[0] != "native")
    return slow_after(sum(case[0] == "native" for case in cases), ordered)


def on_models(*axes: Any, names: str = "") -> pytest.MarkDecorator:
    """Cases of a model, methods for texts and pictures, and values of further axes of these names."""
    cases = on_the_fast_model([(model, *both, *more) for model, both, *more in pairs(MODELS, PAIRS, *axes)])
    return pytest.mark.parametrize(["policy", "text", "image", *names.split()], cases, indirect=["policy"])


@pytest.fixture(scope="module", params=MODELS)
def policy(request: pytest.FixtureRequest, model: UnifiedModel, published: Callable[[str], Path]) -> UnifiedModel:
    return model if request.param == "native" else UnifiedModel.from_pretrained(published(request.param))


@pytest.fixture(scope="module")
def rows(policy: UnifiedModel) -> list[Interleaved]:
    """Responses of one to five segments, with step maps."""
    generator = torch.Generator().manual_seed(zlib.crc32(policy.spec.family.encode()))
    spec = policy.spec
    odd = {spec.mask, spec.pad, spec.bos, *spec.text_end, *spec.special.values(), *spec.image_begin, *spec.image_end}
    words = torch.tensor([i for i in range(*spec.text_range) if i not in odd])

    def steps(n: int) -> Any:
        return torch.randint(0, 3, (n,), generator=generator).int()

    def text(n: int, last: int | None, prompt: bool = False) -> Segment:
        drawn = words[torch.randint(len(words), (n,), generator=generator)]
        tokens: Any = drawn if last is None else torch.cat([drawn[1:], torch.tensor([last])])
        return Segment(Modality.TEXT, tokens, prompt, step=None if prompt else steps(n))

    grid = getattr(policy.embedding, "grid", (2, 3))

    def image(edited: int | None, prompt: bool = False) -> Segment:
        n = grid[0] * grid[1]
        tokens: Any = torch.randint(*spec.image_range, (n,), generator=generator)
        if prompt or edited is None:
            return Segment(Modality.IMAGE, tokens, prompt, grid, step=None if prompt else steps(n))
        chosen: Any = torch.randperm(n, generator=generator) < edited
        step: Any = torch.where(chosen, steps(n), -1).int()
        return Segment(Modality.IMAGE, tokens, False, grid, chosen, step)

    stop, go_on = next(e for e in spec.text_end if e != spec.image_next), spec.image_next
    if not spec.codebook_size:
        return [Interleaved([text(2 + i % 3, None, True), text(1 + i, stop)]) for i in range(ROWS)]
    found = []
    for i in range(ROWS):
        row = [text(1 + i % 4, None, True), image(None, True)]
        whole = None if grid == (2, 3) else 5
        for k, edited in enumerate(((), (1,), (whole, 2), (0,), (whole,), (3,), (2, 4), (4,))[i]):
            row += [text(1 + (i + k) % 5, go_on), image(edited)]
        found.append(Interleaved([*row, text(1 + i % 3, stop)]))
    return found


@pytest.fixture(scope="module")
def canvas(policy: UnifiedModel, rows: list[Interleaved]) -> Canvas:
    return policy.render(rows)


def guidance_for(policy: UnifiedModel, rows: list[Interleaved], config: GRPOConfig) -> Guidance | None:
    """What guided rollouts were compared with: words or pictures of the prompts hidden, and the words shorter, so that
    nothing stands at the same column."""
    short = [
        Interleaved(replace(s, tokens=s.tokens[:1]) if s.modality is Modality.TEXT else s for s in row.prompt)
        for row in rows
    ]
    without = {
        "text": [hidden(cut, Modality.TEXT, policy.spec.mask) for cut in short],
        "image": [hidden(row.prompt, Modality.IMAGE, policy.spec.mask) for row in rows],
    }
    return Guidance.of(without, [row.response for row in rows], config.scales, policy.spec)


Update = Callable[..., tuple[GRPOTrainer, Experience]]


@pytest.fixture
def update(
    policy: UnifiedModel,
    rows: list[Interleaved],
    canvas: Canvas,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Update:
    """update(text, image, **settings) -> a trainer of a copy of the policy, and its experience of the rows."""

    def make_one(text: str, image: str, **settings: Any) -> tuple[GRPOTrainer, Experience]:
        monkeypatch.setattr(trainer_module, "InterleavedSampler", lambda *given: None)  # the rows are there already
        fixed = {"micro_batch_size": 3, "num_iterations": 2, "edit": "random", "check_ratio_every": 1, "quiet": True}
        dtype = settings.pop("dtype", torch.float32)
        config = GRPOConfig(
            text_estimator=text, image_estimator=image, output_dir=str(tmp_path), **{**fixed, **settings}
        )
        trainer = GRPOTrainer(copy.deepcopy(policy).to(dtype), FrozenLake(), config)
        keys = torch.tensor([noise.key(3, i) for i in range(ROWS)])
        draws = draw_views(canvas, *trainer.update.estimators, config.num_iterations, keys)
        own = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(1))  # an advantage for every segment
        advantage = own.gather(1, canvas.segment.clamp(min=0)) * canvas.sampled
        nothing: list[Any] = []
        experience = Experience(
            nothing, nothing, nothing, None, None, canvas, draws, advantage, canvas.sampled,  # type: ignore[arg-type]
            guidance_for(policy, rows, config),
        )  # fmt: skip
        return trainer, experience

    return make_one


# ---------------------------------------------------------------- 1: the ratio; 6: global random states


@on_models(SAMPLING, names="sampling")
@pytest.mark.usefixtures("rng_untouched")
def test_the_first_ratio_is_1(update: Update, text: str, image: str, sampling: str) -> None:
    """Exactly, where old and new are scored in the same company; to float noise in any other."""
    trainer, experience = update(text, image, beta=0.1, check_ratio_every=0, **SAMPLING[sampling])
    updater, batches = trainer.update, trainer.update.batches(experience, 0)
    old = updater.old_values(experience)
    with torch.no_grad():
        whole = updater.values(trainer.model, experience.micro_batch())
        if old is not None:
            for values, batch in zip(old[0], batches, strict=True):
                assert ((values - whole[batch.rows]).exp() - 1).abs().max() < 1e-4
    metrics = updater.run(0, experience)
    assert metrics.get("ratio_first_iteration_max_dev") == (None if old is None else 0)
    assert all(math.isfinite(v) for v in metrics.values())
    assert metrics["tokens/text"] > 0 and metrics["grad_norm"] > 0


@pytest.mark.parametrize("sampling", SAMPLING)
def test_scoring_is_as_warm_and_guided_as_the_rollouts(update: Update, sampling: str) -> None:
    trainer, experience = update("one_step", "one_step", **SAMPLING[sampling])
    (view,), config, score = experience.draws[0].views, trainer.config, trainer.model.score
    with torch.no_grad():
        found = trainer.update.values(trainer.model, experience.micro_batch())
        given = (experience.canvas, view.mask, view.hide)
        warm = score(*given, (config.text_temperature, config.image_temperature))
        expected = score(*given, (config.text_temperature, config.image_temperature), experience.guidance)
        assert torch.equal(found, expected)
        assert torch.equal(warm, score(*given)) is (sampling == "plain")
        assert torch.equal(found, warm) is (sampling != "guided")


# ---------------------------------------------------------------- 2: what has weight


@on_models()
def test_only_tokens_masked_in_this_iteration_count(update: Update, text: str, image: str) -> None:
    """By weight, and by the gradient of the loss: nothing else has one, and each sampled segment has some."""
    trainer, experience = update(text, image)
    canvas, seen = experience.canvas, []
    log_probs = trainer.update.log_probs

    def watched(model: Any, batch: MicroBatch, passes: list[slice]) -> Tensor:
        out = log_probs(model, batch, passes)
        if out.requires_grad:
            out.retain_grad()
            seen.append(([view for part in passes for view in batch.draw.views[part]], out))
        return out

    trainer.update.log_probs = watched  # type: ignore[method-assign]
    for iteration, draw in enumerate(experience.draws):
        weight = experience.weight_BL(iteration)
        assert torch.equal(weight != 0, draw.mask) and not bool((draw.mask & ~canvas.sampled).any())
        assert bool((draw.weight >= 0).all()) and torch.equal(draw.weight != 0, draw.mask)
        assert torch.equal(torch.stack([view.factors != 0 for view in draw.views]).any(0), draw.mask)
        for view in draw.views:
            assert not bool(((view.factors != 0) & ~view.mask).any()) and not bool((view.mask & ~canvas.sampled).any())
            assert view.hide is None or not bool((view.hide & canvas.sampled).any())
        for b in range(ROWS):
            assert set(canvas.segment[b][draw.mask[b]].tolist()) == set(canvas.segment[b][canvas.sampled[b]].tolist())
        denominators = trainer.update.denominators(experience, iteration)
        trainer.update.accumulate([experience.micro_batch(iteration)], denominators)
        reached = torch.zeros_like(canvas.sampled)
        ((views, out),) = seen
        assert out.grad is not None
        for view, own, values, slope in zip(views, draw.rows(torch.arange(ROWS)).views, out, out.grad, strict=True):
            assert torch.equal(view.mask, own.mask) and torch.equal(view.factors, own.factors)
            assert bool((slope[view.factors == 0] == 0).all())
            assert bool((values[~view.scored] == 0).all())
            reached |= slope != 0
        assert torch.equal(reached, draw.mask) or "spg" in (text, image)  # its upper bound may leave a token out
        seen.clear()


# ---------------------------------------------------------------- 4: any cut, any company


def gradient(trainer: GRPOTrainer, experience: Experience, size: int) -> list[Tensor]:
    trainer.policy.zero_grad()
    batches = experience.micro_batches(size, trainer.model.spec.attention, 1)
    trainer.update.accumulate(batches, trainer.update.denominators(experience, 1))
    return [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]


# How views share passes depends on the attention: every method on both kinds of it, cut in halves and into single rows.
CUTS = [
    (("native", MODELS[1 + i % 3])[(i + k) % 2], *both, (4, 1)[k]) for i, both in enumerate(PAIRS) for k in range(2)
]


@pytest.mark.parametrize(("policy", "text", "image", "size"), on_the_fast_model(CUTS), indirect=["policy"])
def test_same_gradient_for_1_times_8_and_2_times_4_and_8_times_1(
    update: Update, text: str, image: str, size: int, exact: torch.dtype
) -> None:
    """As `exact` says, but for what is float32 in any model: RMSNorm, rotary embedding (6e-8 of what passes them)."""
    losses = [name for name in LOSSES if name != "rtb"]  # see test_balance
    loss_type = losses[list(ESTIMATORS).index(text) % len(losses)]
    trainer, experience = update(text, image, loss_type=loss_type, dtype=exact, **list(SAMPLING.values())[-1])
    whole, cut = gradient(trainer, experience, 8), gradient(trainer, experience, size)
    norm = torch.stack([g.norm() for g in whole]).norm()
    assert norm > 1e-3
    assert max(float((a - b).abs().max()) for a, b in zip(whole, cut, strict=True)) < 1e-7 * norm


@on_models((1, 2, 3, 12), names="iterations")
def test_each_of_the_masks_is_used_exactly_once(update: Update, text: str, image: str, iterations: int) -> None:
    """Every row of it, by the new policy in the pass that it was drawn for, and by the old one before the first (unless
    there is one iteration, or nothing that was sampled has a ratio). Nothing is run: what would be is counted."""
    trainer, experience = update(text, image, num_iterations=iterations, check_ratio_every=0)
    new, old = torch.zeros(2, iterations, ROWS, dtype=torch.int64)
    updater = trainer.update
    values, back = updater.values, updater.backward

    def scored(model: Any, batch: MicroBatch) -> Tensor:
        old[batch.iteration, batch.rows] += not torch.is_grad_enabled()
        return values(model, batch)

    def passed(batch: MicroBatch, *given: Any, **named: Any) -> Any:
        new[batch.iteration, batch.rows] += 1
        assert bool((new[: batch.iteration] == 1).all()) and not new[batch.iteration + 1 :].any()  # in order
        return back(batch, *given, **named)

    def nothing(model: Any, batch: MicroBatch, passes: list[slice]) -> Tensor:
        count = sum(len(batch.draw.views[part]) for part in passes)
        return torch.zeros(count, *batch.canvas.shape, requires_grad=torch.is_grad_enabled())

    updater.values, updater.backward, updater.log_probs = scored, passed, nothing  # type: ignore[method-assign]
    updater.run(0, experience)
    sampled = set(experience.canvas.modality[experience.canvas.sampled].tolist())  # LLaDA has no pictures
    has_old = iterations > 1 and any(e.ratio for m, e in zip(Modality, updater.estimators) if m in sampled)
    assert bool((new == 1).all()) and bool((old == has_old).all())
    still = ("one_step", "wd1", "trace", "left_to_right")  # they mask the same in every iteration
    if iterations > 1 and text not in still:
        assert len({str([view.mask.nonzero() for view in draw.views]) for draw in experience.draws}) > 1


@each("name", ESTIMATORS)
def test_masks_do_not_depend_on_order_or_company(policy: UnifiedModel, rows: list[Interleaved], name: str) -> None:
    method, keys = make(name), torch.tensor([noise.key(9, i) for i in range(ROWS)])

    def draws_of(rows: list[Interleaved], keys: Tensor) -> list[Draw]:
        return draw_views(policy.render(rows), method, method, 2, keys)

    order = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    whole, shuffled = draws_of(rows, keys), draws_of([rows[i] for i in order], keys[order])
    for b in range(ROWS):
        alone = [draw.rows(torch.tensor([0])) for draw in draws_of(rows[b : b + 1], keys[b : b + 1])]
        for draws, at in ((whole, b), (shuffled, order.tolist().index(b))):
            for mine, other in zip(alone, draws):
                taken, width = other.rows(torch.tensor([at])), mine.weight.shape[1]
                assert torch.equal(mine.weight, taken.weight[:, :width]) and not taken.weight[:, width:].any()
                assert not any(view.scored.any() for view in taken.views[len(mine.views) :])  # of longer rows
                for x, y in zip(mine.views, taken.views):
                    assert torch.equal(x.mask, y.mask[:, :width]) and torch.equal(x.factors, y.factors[:, :width])
                    hidden = [None if v.hide is None else v.hide[:, :width] for v in (x, y)]
                    assert hidden[0] is hidden[1] is None or torch.equal(*hidden)  # type: ignore[arg-type]
