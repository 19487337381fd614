"""Invariants of design §8 that the trainer has to keep: 1 (ratio), 2 (weights), 4 (any cut of a batch), 8 (routing)."""

import copy
from itertools import cycle

import numpy as np
import pytest
import torch

import unidiff.grpo.update as update_module
from tests.covering import couples, pairs, slow_after
from unidiff.estimators import ESTIMATORS
from unidiff.grpo.losses import LOSSES
from unidiff.rewards.reward import reward
from unidiff.rewards.router import ASSIGNMENTS
from unidiff.sequence import Modality

LOSS_TYPES = tuple(name for name in LOSSES if name != "rtb")  # see test_balance: its advantages are sums in float32
WARM = {"text_temperature": 0.7, "image_temperature": 1.4}


# ---------------------------------------------------------------------------------------------- 1: the ratio


@pytest.mark.parametrize(("both", "num_iterations"), list(zip(couples(ESTIMATORS), cycle((1, 3)))))
def test_first_ratio_is_1(make_trainer, both, num_iterations):
    """Of rollouts that the policy sampled, in a step after one that changed it much."""
    settings = {"text_estimator": both[0], "image_estimator": both[1], "num_iterations": num_iterations}
    trainer = make_trainer(**settings, **WARM, learning_rate=1e-2)
    for step in range(2):
        metrics, _ = trainer.step(step)
        assert metrics["ratio_first_iteration_max_dev"] < 1e-4


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_first_ratio_is_1_with_a_reference_and_any_loss(make_trainer, loss_type):
    metrics, _ = make_trainer(num_iterations=2, beta=0.1, loss_type=loss_type, edit="full", **WARM).step(0)
    assert metrics["ratio_first_iteration_max_dev"] < 1e-4


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_the_metric_sees_two_policies_that_disagree(make_trainer, num_iterations):
    """Old and new scored in different modes, as with dropout left on."""
    trainer = make_trainer(num_iterations=num_iterations)
    values, calls = trainer.update.values, []

    def noisy(*args):
        calls.append(args)
        return values(*args) + (0.01 if len(calls) % 3 == 0 else 0.0)

    trainer.update.values = noisy
    assert trainer.step(0)[0]["ratio_first_iteration_max_dev"] > 0.005


# What a score may not depend on: how many rows a pass has, how wide it is, what the other rows say.
COMPANY = {
    "nothing": lambda hidden: hidden,
    "rows": lambda hidden: hidden * (1 + 0.01 * hidden.shape[0]),
    "columns": lambda hidden: hidden * (1 + 0.001 * hidden.shape[1]),
    "neighbours": lambda hidden: hidden + 0.05 * hidden.mean((0, 1)),
}


@pytest.mark.parametrize(
    ("fault", "micro_batch_size", "num_iterations"),
    slow_after(8, sorted(pairs(COMPANY, (1, 2, 4, 5, 8), (1, 2)), key=lambda case: case[1])),
)
def test_the_metric_sees_a_score_that_depends_on_company(make_trainer, model, fault, micro_batch_size, num_iterations):
    policy = copy.deepcopy(model)

    def spoiled(module, given, out):
        out.last_hidden_state = COMPANY[fault](out.last_hidden_state)
        return out

    policy.backbone.get_decoder().register_forward_hook(spoiled)
    settings = {"num_generations": 5, "num_iterations": num_iterations, "micro_batch_size": micro_batch_size}
    metrics, _ = make_trainer(policy=policy, **settings).step(0)
    dev = metrics["ratio_first_iteration_max_dev"]
    assert dev < 1e-4 if fault == "nothing" else dev > 1e-3


# ---------------------------------------------------------------------------------------------- 2: the weights


def recorded(trainer, monkeypatch):
    """Runs a step; [(iteration, rows, new log-probs with their gradient, weights)] of every backward pass."""
    found, scored = [], {}
    values, loss = trainer.update.values, update_module.modality_loss

    def watched_values(model, batch):
        out = values(model, batch)
        if out.requires_grad:
            out.retain_grad()
            scored[id(out)] = (batch.iteration, batch.rows)
        return out

    def watched_loss(new, old, advantage, weight, modality, **options):
        found.append((*scored[id(new)], new, weight))
        return loss(new, old, advantage, weight, modality, **options)

    trainer.update.values = watched_values
    monkeypatch.setattr(update_module, "modality_loss", watched_loss)
    _, experience = trainer.step(0)
    return experience, found


@pytest.mark.parametrize(("estimator", "micro_batch_size"), [("fading_out", 1), ("one_step", 4), ("fading_out", 100)])
def test_each_mask_is_used_once_and_only_its_tokens_have_weight_and_gradient(
    make_trainer, model, monkeypatch, estimator, micro_batch_size
):
    settings = {"text_estimator": estimator, "image_estimator": "image_random", "beta": 0.1}  # KL: all rows are run
    trainer = make_trainer(num_iterations=3, micro_batch_size=micro_batch_size, image_min_ratio=0.3, **settings)
    experience, found = recorded(trainer, monkeypatch)
    canvas, batch = experience.canvas, len(experience.rollouts)
    assert [i for i, *_ in found] == sorted(i for i, *_ in found)  # iterations in order, none interleaved
    for iteration in range(3):
        rows = torch.cat([r for i, r, *_ in found if i == iteration])
        assert sorted(rows.tolist()) == list(range(batch))
    for iteration, rows, new, weight in found:
        masked = (experience.draws[iteration].mask & canvas.sampled)[rows]
        assert torch.equal(weight > 0, masked) and set(weight.unique().tolist()) <= {0.0, 1.0}
        assert bool((new[~masked] == 0).all()) and float((new[masked] != 0).float().mean()) > 0.9  # it scored this view
        assert new.grad is not None and bool((new.grad[~masked] == 0).all())
        assert bool((new.grad[masked] != 0).any())
        if iteration == 0:  # the policy has not changed
            (view,) = experience.draws[0].rows(rows).views
            torch.testing.assert_close(new, model.score(canvas.rows(rows), view.mask, view.hide), atol=1e-5, rtol=0)
    masks = [draw.mask for draw in experience.draws]
    assert not torch.equal(masks[0], masks[1]) or estimator == "one_step"
    assert all(bool((~m & canvas.sampled).any()) for m in masks[:2])  # some tokens stand: the test means something


def test_no_weight_outside_what_the_policy_chose(make_trainer):
    _, experience = make_trainer(num_prompts=4, edit="confidence").step(0)
    canvas = experience.canvas
    weight = experience.weight_BL(0)
    assert weight[~canvas.sampled].sum() == 0 and weight[~canvas.clean.valid].sum() == 0
    assert weight[canvas.clean.offset < 0].sum() == 0  # delimiters
    given = torch.tensor([len(r.sequence.prompt) for r in experience.rollouts])
    assert weight[canvas.segment < given[:, None]].sum() == 0
    for b, rollout in enumerate(experience.rollouts):
        for s, segment in enumerate(rollout.segments):
            own = weight[b][(canvas.segment[b] == len(rollout.sequence.prompt) + s) & (canvas.clean.offset[b] >= 0)]
            if segment.modality is Modality.IMAGE:
                assert own[~segment.sampled].sum() == 0 and own.sum() > 0


# ---------------------------------------------------------------------------------------------- 4: any cut of a batch


def after_a_step(make_trainer, weights, **settings):
    """Weights, metrics, and the gradients of both iterations over their norms."""
    trainer = make_trainer(num_iterations=2, learning_rate=1e-4, **settings)
    gradients, clip = {}, trainer.accelerator.clip_grad_norm_

    def watched(parameters, limit):
        at = len(gradients)
        grads = [p.grad for p in trainer.model.parameters()]
        norm = torch.stack([g.norm() for g in grads]).norm()
        gradients.update({at + i: g / norm for i, g in enumerate(grads)})
        return clip(parameters, limit)

    trainer.accelerator.clip_grad_norm_ = watched
    metrics, _ = trainer.step(0)
    return weights(trainer), gradients, metrics


CUTS = [{"loss_type": loss_type, "assignment": a} for loss_type, a in zip(LOSS_TYPES, cycle(ASSIGNMENTS))]
CUTS += [{"scale_rewards": "batch"}, {"beta": 0.1, "text_estimator": "one_step"}]
CUTS += [{"text_guidance": 0.5, "image_guidance": 1.0, "score_guidance": False}]


@pytest.mark.parametrize("settings", slow_after(2, CUTS), ids=str)
def test_same_parameters_for_any_micro_batch_size(make_trainer, weights, difference, same_metrics, exact, settings):
    whole, gradients, metrics = after_a_step(make_trainer, weights, dtype=exact, micro_batch_size=100, **settings)
    for size in (1, 4):  # single rows, and cuts through groups
        cut, gradients_cut, same = after_a_step(make_trainer, weights, dtype=exact, micro_batch_size=size, **settings)
        assert difference(gradients, gradients_cut) < 1e-12, size
        assert difference(whole, cut) < 1e-10, size  # a millionth of the learning rate
        same_metrics(metrics, same)


# ---------------------------------------------------------------------------------------------- 8: routed advantage


def other_images(segments, **columns):
    return [-float(np.asarray(s.pixels)[::2].mean()) for s in segments]


def advantages(make_trainer, rewards, **settings):
    _, experience = make_trainer(rewards, **settings).step(0)
    canvas = experience.canvas
    return [experience.advantage_BL[canvas.sampled & (canvas.modality == m)] for m in Modality]


@pytest.mark.parametrize(
    ("assignment", "scale_rewards"),
    [("factorized", "group"), ("factorized", "batch"), ("segment", "group"), ("segment", "none")],
)
def test_image_rewards_change_no_text_advantage(make_trainer, rewards, assignment, scale_rewards):
    words, image = rewards
    changed = reward(other_images, on="image", weight=-7.0, name="bright")
    settings = {"assignment": assignment, "scale_rewards": scale_rewards}
    text, picture = advantages(make_trainer, [words, image], **settings)
    text_then, picture_then = advantages(make_trainer, [words, changed], **settings)
    text_alone, _ = advantages(make_trainer, [words], **settings)
    assert torch.equal(text, text_then) and torch.equal(text, text_alone)
    assert not torch.allclose(picture, picture_then, atol=1e-3)


def test_image_rewards_change_text_advantages_under_joint(make_trainer, rewards):
    words, image = rewards
    changed = reward(other_images, on="image", weight=-7.0, name="bright")
    text, _ = advantages(make_trainer, [words, image], assignment="joint")
    text_then, _ = advantages(make_trainer, [words, changed], assignment="joint")
    assert not torch.allclose(text, text_then, atol=1e-3)


def test_text_rewards_change_no_image_gradient(make_trainer, rewards, model):
    """Under factorized the head's rows of the codebook learn from image rewards alone."""
    words, image = rewards
    flipped = reward(words.function, on="text", weight=-words.weight, name="flipped")
    low, high = model.spec.image_range
    heads = []
    for text_reward in (words, flipped):
        trainer = make_trainer([text_reward, image], policy=copy.deepcopy(model), max_grad_norm=float("inf"))
        trainer.step(0)
        heads.append(trainer.model.backbone.lm_head.weight[low:high].detach().clone())
    assert torch.equal(*heads) and not torch.equal(heads[0], model.backbone.lm_head.weight[low:high])
