"""Bugs of public code (table in docs/estimators.md) that no other test would see; and the tests that it names exist."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from unidiff.estimators import draw_views, make
from unidiff.sequence import Modality

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_dropout_never_runs(make_trainer, model, timeless, num_iterations):
    """Not in rollouts, nor in scores of the old, new or reference policy, though the model comes in training mode."""
    dropping = copy.deepcopy(model).train()
    for layer in dropping.backbone.model.layers:
        layer.mlp = nn.Sequential(layer.mlp, nn.Dropout(0.5)).train()
    settings = {"num_iterations": num_iterations, "beta": 0.1, "learning_rate": 1e-4}
    trainer, plain = make_trainer(policy=dropping, **settings), make_trainer(**settings)
    for step in range(2):
        metrics, _ = trainer.step(step)
        assert metrics["ratio_first_iteration_max_dev"] < 1e-4
        assert timeless(metrics) == pytest.approx(timeless(plain.step(step)[0]), abs=1e-5, rel=1e-4)


def test_log_probabilities_are_not_rounded_to_the_weights_dtype(model, prompts):
    """A bfloat16 policy has the log-probabilities that float64 gives to its weights and hidden states: a clip range of
    0.001 means something."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    rows = [p + half.encode(["go", "find"], prompt=False) for p in prompts]
    canvas, method = half.render(rows), make("one_step", hide_prompt=0.0)
    (draw,) = draw_views(canvas, method, method, 1, torch.arange(len(rows)))
    with torch.no_grad():
        logp = half.score(canvas, draw.views[0].mask)[draw.views[0].mask]
        hidden = torch.randn(50, half.backbone.config.hidden_size, dtype=torch.bfloat16) * 2
        whole = half.log_probs(hidden, Modality.TEXT)
        low, high = half.spec.text_range
        logits = hidden.double() @ half.backbone.lm_head.weight[low:high].double().T
    assert logp.dtype == torch.float32 and bool((logp != logp.bfloat16()).float().mean() > 0.9)
    assert whole.exp().sum(-1).sub(1).abs().max() < 1e-5
    assert not low <= half.spec.mask < high  # or its logit would be left out
    assert (whole - logits.log_softmax(-1)).abs().max() < 1e-5


def test_the_table_names_tests_that_exist():
    page = (ROOT / "docs" / "estimators.md").read_text().split("## Bugs of public code")[1]
    named = re.findall(r"`([\w/]+)::(\w+)`", page)
    assert len(named) > 20
    for file, name in named:
        tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
