"""Relative trajectory balance: its optimum on a vocabulary that is enumerated, and its gradient in the update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tables import each
from unidiff import GRPOConfig
from unidiff.grpo.balance import residuals
from unidiff.grpo.trainer import GRPOTrainer

RTB = {"loss_type": "rtb", "scale_rewards": "none", "assignment": "joint"}


def tilted(reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """p_ref · exp(r / β), normalised."""
    return (reference.log() + reward / beta).softmax(0)


@pytest.fixture(scope="module")
def toy() -> tuple[Tensor, Tensor]:
    """A reference over six rollouts, and their rewards."""
    return torch.tensor([0.05, 0.3, 0.2, 0.25, 0.1, 0.1]).double(), torch.tensor(
        [1.0, 0.0, 0.3, 0.8, -1.0, 0.3]
    ).double()


@each("beta", [0.2, 1.0, 5.0])
def test_residuals_vanish_at_the_tilted_reference(toy: tuple[Tensor, Tensor], beta: float) -> None:
    """Of any group of rollouts, whoever drew them."""
    reference, reward = toy
    change = tilted(reference, reward, beta).log() - reference.log()
    picked = torch.tensor([0, 3, 3, 5, 1, 2, 4, 4, 2])
    groups = torch.tensor([7, 7, 7, 7, 2, 2, 2, 9, 9])
    for group in groups.unique():
        own = groups == group
        advantage = reward[picked[own]] - reward[picked[own]].mean()
        assert residuals(advantage, change[picked[own]], groups[own], beta).abs().max() < 1e-12
    uniform = torch.zeros(6).double() - reference.log()
    assert residuals(reward - reward.mean(), uniform, torch.zeros(6).long(), beta).abs().max() > 0.05


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_gradient_leads_to_the_tilted_reference(toy: tuple[Tensor, Tensor], beta: float) -> None:
    """From another policy, on rollouts of a third one."""
    reference, reward = toy
    logits = torch.tensor([2.0, 0.0, -1.0, 0.0, 1.0, -2.0]).double().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        picked = torch.randint(6, (8,), generator=generator)
        logp = logits.log_softmax(0)[picked]
        change = (logp - reference[picked].log()).detach()
        own = residuals(reward[picked] - reward[picked].mean(), change, torch.zeros(8).long(), beta)
        (gradient,) = torch.autograd.grad(-(own * logp).mean(), [logits])
        logits.data -= min(1.0, 0.5 / beta) * gradient
    assert torch.allclose(logits.detach().softmax(0), tilted(reference, reward, beta), atol=1e-6)


@pytest.mark.parametrize(("micro", "estimator"), [(1, "trace"), (2, "elbo"), (6, "trace"), (1, "elbo")])
def test_the_update_has_the_gradient_of_the_loss(
    make_trainer: Callable[..., GRPOTrainer], exact: torch.dtype, micro: int, estimator: str
) -> None:
    """However the groups are cut into micro-batches; with a policy that has left its reference."""
    beta = 0.05
    names: Any = {"text_estimator": estimator, "image_estimator": estimator}
    trainer = make_trainer(**RTB, **names, beta=beta, micro_batch_size=micro, dtype=exact, learning_rate=3e-3)
    _, experience = trainer.step(0)
    update, rows = trainer.update, len(experience.rollouts)
    (whole,) = experience.micro_batches(rows * 100, trainer.model.spec.attention)
    reference = update.reference_values(whole)
    assert reference is not None
    gap = (update.values(update.policy, whole) - reference).double() * whole.weight_RL
    change = torch.zeros(rows, dtype=exact).index_add(0, whole.rows, gap.sum(1))
    advantage = (experience.advantage_BL.sum(1) / experience.trained_BL.sum(1)).double()
    assert change.abs().max() > 1e-3 and advantage.abs().max() > 1e-3
    groups = [change[i : i + 3] - change[i : i + 3].mean() - advantage[i : i + 3] / beta for i in (0, 3)]
    loss = beta / 2 * (torch.cat(groups) ** 2).mean()
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)

    batches = update.balanced(update.batches(experience, 0), experience)
    assert len(batches) > 1 or micro == rows
    update.accumulate(batches, update.denominators(experience, 0))
    for p, wanted in zip(parameters, expected):
        found = torch.zeros_like(p) if p.grad is None else p.grad
        wanted = torch.zeros_like(p) if wanted is None else wanted
        assert float((found - wanted).norm()) <= 1e-5 * max(float(wanted.norm()), 1e-2)  # values are float32


def test_a_run_with_several_iterations(make_trainer: Callable[..., GRPOTrainer]) -> None:
    metrics = make_trainer(**RTB, text_estimator="trace", image_estimator="elbo", beta=0.1, num_iterations=2).train()
    assert all(m["kl/text"] >= 0 and m["grad_norm"] > 0 for m in metrics)
    assert metrics[-1]["kl/text"] > 0


@each(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta is 0; loss_type rtb needs its temperature"),
        ({"scale_rewards": "group"}, "scale_rewards is group; loss_type rtb, of whole rollouts, needs none"),
        ({"assignment": "factorized"}, "assignment is factorized; loss_type rtb, of whole rollouts, needs joint"),
        ({"leave_one_out": True}, "leave_one_out is True; loss_type rtb, of whole rollouts, needs false"),
        ({"image_weight": 0.5}, r"image_weight is 0\.5; loss_type rtb, of whole rollouts, needs 1\.0"),
        ({"text_estimator": "wd1"}, "text_estimator: its values do not sum to a log-probability of the segment"),
        ({"text_estimator": "trace"}, "image_estimator: its values do not sum"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions is True; .* needs false"),
        ({"importance_cap": 2.0}, r"importance_cap is 2\.0; .* needs none"),
    ],
)
def test_what_does_not_fit_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**{**RTB, "beta": 0.1, **settings})
