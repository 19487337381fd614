"""Estimators in the trainer: which masks are run, passes one by one, resumed runs, credit, and what they cost.

Invariants 1, 2, 4 and 6 of the design for every one of them: test_every_estimator.py.
"""

import copy
import itertools
import math
from dataclasses import dataclass, replace
from itertools import cycle

import pytest
import torch

from tests.covering import couples, slow_after
from unidiff.estimators import ESTIMATORS, Estimator, View, make
from unidiff.memory import PeakMemory
from unidiff.sequence import Modality

MIXED = [("trace:merge=2", "elbo"), ("spg:samples=3", "coupled"), ("left_to_right", "wd1")]


# ---------------------------------------------------------------- every mask is used


def watched(trainer):
    """Runs a step. [(iteration, micro-batch, [(views, log-probs with their gradient) of each backward pass])]."""
    found, update = [], trainer.update
    back, log_probs = update.backward, update.log_probs

    def watch_backward(batch, denominators, last):
        found.append((batch.iteration, batch, []))
        return back(batch, denominators, last)

    def watch_log_probs(model, batch, passes):
        out = log_probs(model, batch, passes)
        if out.requires_grad:
            out.retain_grad()
            found[-1][2].append(([view for part in passes for view in batch.draw.views[part]], out))
        return out

    update.backward, update.log_probs = watch_backward, watch_log_probs
    metrics, experience = trainer.step(0)
    return metrics, experience, found


@pytest.mark.parametrize(
    ("text", "image", "size", "iterations"),
    [("fading_out", "image_random", 2, 12), ("spg", "elbo", 100, 3), ("spg", "elbo", 2, 1)],
)
def test_each_of_the_masks_is_run_exactly_once(make_trainer, text, image, iterations, size):
    """Of the pass that it was drawn for. In test_every_estimator it is counted for every method, and not run."""
    settings = {"num_iterations": iterations, "micro_batch_size": size, "beta": 0.1}  # KL: all rows are run
    trainer = make_trainer(text_estimator=text, image_estimator=image, **settings)
    _, experience, found = watched(trainer)
    for iteration in range(iterations):
        rows = torch.cat([batch.rows for i, batch, _ in found if i == iteration])
        assert sorted(rows.tolist()) == list(range(6))
        for batch, passes in ((batch, p) for i, batch, p in found if i == iteration):
            run = [view for views, _ in passes for view in views]
            for view, own in zip(run, experience.draws[iteration].rows(batch.rows).views, strict=True):
                assert torch.equal(view.mask, own.mask) and torch.equal(view.factors, own.factors)
    masks = [torch.stack([view.mask for view in draw.views]) for draw in experience.draws]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


# ---------------------------------------------------------------- ratio, and any cut of a batch


@pytest.mark.parametrize(
    ("text", "image", "loss_type"), [(*m, loss) for m, loss in zip(MIXED, ("grpo", "gmpo", "gspo"))]
)
def test_first_ratio_is_1_for_mixed_methods(make_trainer, text, image, loss_type):
    settings = {"num_iterations": 2, "beta": 0.1, "loss_type": loss_type, "text_temperature": 0.7}
    trainer = make_trainer(text_estimator=text, image_estimator=image, **settings)
    metrics, _ = trainer.step(0)
    assert metrics["ratio_first_iteration_max_dev"] < 1e-4
    assert all(math.isfinite(v) for v in metrics.values())


def gradients(make_trainer, **settings):
    """Gradients of both iterations over their norms, and metrics."""
    trainer = make_trainer(num_iterations=2, max_rounds=1, **settings)
    kept, clip = {}, trainer.accelerator.clip_grad_norm_

    def watched(parameters, limit):
        grads = [p.grad for p in trainer.model.parameters()]
        norm = torch.stack([g.norm() for g in grads]).norm()
        kept.update({len(kept) + i: g / norm for i, g in enumerate(grads)})
        return clip(parameters, limit)

    trainer.accelerator.clip_grad_norm_ = watched
    return kept, trainer.step(0)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("both", "size"), list(zip(couples(ESTIMATORS), cycle((1, 4)))))
def test_same_gradient_for_any_micro_batch_size(make_trainer, difference, same_metrics, exact, both, size):
    """Of both iterations, and the same metrics. In test_every_estimator: for every method, modality and attention."""
    settings = {"text_estimator": both[0], "image_estimator": both[1], "dtype": exact}
    whole, metrics = gradients(make_trainer, micro_batch_size=100, **settings)
    cut, same = gradients(make_trainer, micro_batch_size=size, **settings)
    # Not 1e-12: RMSNorm works in float32 (6e-8), also on the gradients of views that have a pass each.
    assert difference(whole, cut) < 1e-7
    same_metrics(metrics, same)


@dataclass(frozen=True)
class Halves(Estimator):
    """Each token is scored once, in one of two views; a segment has one value."""

    unit = "segment"

    def views(self, ask):
        halves = [ask.among & (ask.rank % 2 == side) for side in (0, 1)]
        return [View(half, factor=half / ask.length.clamp(min=1)) for half in halves]


@dataclass(frozen=True)
class Mixed(Halves):
    """Each token has a value, and it depends on what the other view says of its segment."""

    unit = "token"

    def combine(self, logp_KBL, factor_KBL, place, advantage_BL):
        value_BL = (logp_KBL * factor_KBL).sum(0)
        return value_BL * place.total(value_BL)


@pytest.mark.parametrize(
    ("text", "image", "loss_type", "times"),
    [
        ("trace", "left_to_right", "dapo", 1),  # a token's loss depends on the pass that scores it, and on no other
        pytest.param("trace", "left_to_right", "gmpo", 2, marks=pytest.mark.slow),
        pytest.param("elbo:samples=4", "trace", "grpo", 2, marks=pytest.mark.slow),
        ("coupled", "coupled", "grpo", 2),
        (Halves(), Halves(), "grpo", 2),
        (Mixed(), Halves(), "grpo", 2),
        (Mixed(), Mixed(), "grpo", 2),
    ],
)
def test_passes_one_by_one_give_the_gradient_of_one_for_all(make_trainer, exact, text, image, loss_type, times):
    """What the trainer does where views do not fit into one pass, against one graph through all of them."""
    settings = {"loss_type": loss_type, "max_grad_norm": math.inf, "beta": 0.1}
    if isinstance(text, str):
        settings |= {"text_estimator": text, "image_estimator": image}
    trainer = make_trainer(dtype=exact, **settings)
    if not isinstance(text, str):
        trainer.update.estimators = (text, image)
    _, experience = trainer.step(0)
    update, whole = trainer.update, experience.micro_batch()
    count = len(experience.draws[0].views)
    cuts = sorted({0, 1, min(3, count), count})
    denominators = update.denominators(experience, 0)
    with torch.no_grad():
        new = update.values(trainer.policy, whole)
    old = new + 0.3 * torch.randn(new.shape, generator=torch.Generator().manual_seed(1))  # some ratios are clipped
    whole = replace(whole, old_RL=old, reference_RL=update.reference_values(whole))
    parts = replace(whole, passes=[slice(a, b) for a, b in itertools.pairwise(cuts)])

    trainer.policy.zero_grad()
    loss, expected_stats = update.loss(whole, update.values(trainer.policy, whole), denominators)
    loss.backward()
    expected = [p.grad.clone() for p in trainer.policy.parameters()]
    trainer.policy.zero_grad()
    log_probs, runs = update.log_probs, []
    update.log_probs = lambda model, batch, passes: runs.extend(passes) or log_probs(model, batch, passes)
    stats = update.backward(parts, denominators, last=True)
    assert sum(part.stop - part.start for part in runs) == times * count
    norm = torch.stack([g.norm() for g in expected]).norm()
    for p, gradient in zip(trainer.policy.parameters(), expected):
        assert (p.grad - gradient).abs().max() < 1e-7 * norm  # RMSNorm, as above
    for modality, own in stats.items():
        assert own.means() == pytest.approx(expected_stats[modality].means(), rel=1e-5, abs=1e-9)


class Killed(Exception):
    pass


@pytest.mark.parametrize(("text", "image"), slow_after(1, [("spg", "coupled"), ("trace", "random")]))
def test_a_resumed_run_draws_the_same_masks(make_trainer, timeless, tmp_path, text, image):
    settings = {"text_estimator": text, "image_estimator": image, "num_iterations": 2, "max_steps": 2, "save_steps": 1}
    settings |= {"num_generations": 2, "eval_size": 1, "max_rounds": 1}
    draws = {}

    def keep(step, metrics, experience):
        draws[step] = experience.draws

    def kill(step, metrics, experience):
        if step == 1:
            raise Killed

    history = make_trainer(options={"on_step": keep}, **settings).train()
    first, settings["output_dir"] = draws.pop(1), str(tmp_path / "killed")
    with pytest.raises(Killed):
        make_trainer(options={"on_step": kill}, **settings).train()
    resumed = make_trainer(options={"on_step": keep}, resume=True, **settings)
    assert timeless(resumed.train()[1]) == timeless(history[1]) and resumed.start == 1
    for draw, again in zip(first, draws[1], strict=True):
        assert torch.equal(draw.weight, again.weight)
        for view, same in zip(draw.views, again.views, strict=True):
            assert torch.equal(view.mask, same.mask) and torch.equal(view.factors, same.factors)


# ---------------------------------------------------------------- credit and cost


def test_wd1_trains_by_weights_of_the_group(make_trainer):
    """softmax(A) − softmax(−A) over the k-th segments of a modality, times their number; no old policy is scored."""
    trainer = make_trainer(num_iterations=2, assignment="segment", text_estimator="wd1", image_estimator="wd1")
    seen = []
    trainer.update.old_values = lambda *args, make=trainer.update.old_values: seen.append(make(*args))
    metrics, experience = trainer.step(0)
    assert seen == [None] and metrics["ratio_first_iteration_max_dev"] < 1e-4
    routed, modality_BS = experience.routed, experience.table.modality_BS
    given = torch.tensor([len(r.sequence.prompt) for r in experience.rollouts])
    for group in range(2):
        rows = range(3 * group, 3 * group + 3)
        for modality in Modality:
            for k in range(3):
                own = [[s for s in range(modality_BS.shape[1]) if modality_BS[b, s] == modality] for b in rows]
                held = [(b, s[k]) for b, s in zip(rows, own) if len(s) > k and routed.valid_BS[b, s[k]]]
                plain = torch.tensor([routed.advantage_BS[b, s] for b, s in held])
                expected = (plain.softmax(0) - (-plain).softmax(0)) * len(held)
                for (b, s), value in zip(held, expected):
                    tokens = (experience.canvas.segment[b] == given[b] + s) & experience.canvas.sampled[b]
                    found = experience.advantage_BL[b][tokens].tolist()
                    assert found == pytest.approx([value.item()] * int(tokens.sum()), abs=1e-6)


def peak_of_update(make_trainer, model, **settings):
    trainer = make_trainer(policy=copy.deepcopy(model), check_ratio_every=0, **settings)
    meter, run = PeakMemory(), trainer.update.run

    def watched_run(*args):
        with meter:
            return run(*args)

    trainer.update.run = watched_run
    trainer.step(0)
    return meter.peak


@pytest.mark.slow
def test_memory_does_not_grow_with_iterations_or_views(make_trainer, model):
    base = {"num_prompts": 2, "micro_batch_size": 2}
    few, many = (peak_of_update(make_trainer, model, num_iterations=n, **base) for n in (2, 6))
    many_views = ("elbo:samples=2", "left_to_right", "elbo:samples=12", "elbo:samples=24")
    views = [peak_of_update(make_trainer, model, num_iterations=2, text_estimator=name, **base) for name in many_views]
    rows = peak_of_update(make_trainer, model, num_prompts=2, micro_batch_size=6, num_iterations=2)
    assert rows > 1.5 * few  # the meter sees what there is to see
    assert many < 1.1 * few and views[3] < 1.1 * views[2]
    assert max(views) < 1.2 * few  # as many tokens in a pass, in fewer but longer rows


def test_calls_of_the_old_policy_are_chunks(make_trainer):
    trainer = make_trainer(num_iterations=12, micro_batch_size=2)
    sizes, log_probs = [], trainer.update.log_probs
    trainer.update.log_probs = lambda model, batch, passes: (
        sizes.extend([len(batch.rows)] * len(passes)) or log_probs(model, batch, passes)
    )
    trainer.step(0)
    assert max(sizes) <= 2 and len(sizes) >= 12


def test_settings_with_options_reach_the_trainer(make_trainer):
    trainer = make_trainer(text_estimator="trace:merge=3", image_estimator="random:min_ratio=0.9", image_min_ratio=0.1)
    assert trainer.update.estimators == (make("trace", merge=3), make("random", min_ratio=0.9))
    for wrong, message in (
        ("trace:merg=3", "text_estimator: estimator 'trace' has no option 'merg'; known: merge; did you mean 'merge'"),
        ("trace:merge=x", "text_estimator: trace.merge is 'x'; it must be a whole number"),
        ("trace:merge", "text_estimator: estimator 'trace:merge': 'merge' is not an option; write name:option=value"),
        ("trace:merge=2:merge=3", "text_estimator: estimator 'trace:merge=2:merge=3': merge is given twice"),
        ("elbo:samples=3", "text_estimator: samples is 3; antithetic views come in pairs"),
        ("tracer:merge=3", "text_estimator: estimator 'tracer' is not known; .* did you mean 'trace'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(text_estimator=wrong)
