"""Runs estimators: draws a step's views, scores them with a model, and combines the scores into values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unidiff.canvas import Canvas
from unidiff.estimators.checks import check_values, checked_views
from unidiff.estimators.estimator import Ask, Estimator
from unidiff.estimators.view import Draw, Place, View
from unidiff.guidance import Guidance
from unidiff.sequence import Modality


def draw_views(
    canvas: Canvas, text: Estimator, image: Estimator, iterations: int, keys_B: Tensor, key: int = 0
) -> list[Draw]:
    """The draws of all inner iterations. The k-th views of both estimators are one view of the draw.

    keys_B: int64 [B], one noise key per row. key: of the step, see `Ask.step_uniform`. A view has one clean sequence,
    so prompt tokens that one estimator hides are hidden for both. Raises ValueError for keys that do not fit the
    canvas, for less than one iteration, and for mistakes of an estimator (`checks.checked_views`).
    """
    if keys_B.shape != (canvas.shape[0],):
        raise ValueError(f"keys_B has shape {tuple(keys_B.shape)}, but the canvas has {canvas.shape[0]} rows")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; at least 1 is needed")
    place = Place.of(canvas)
    draws = []
    for i in range(iterations):
        asks = [Ask(canvas, place, modality, i, iterations, keys_B, key) for modality in Modality]
        own = [checked_views(estimator, ask) for estimator, ask in zip((text, image), asks)]
        weight = _loss_weight(own[0], place, text) + _loss_weight(own[1], place, image)
        draws.append(Draw(_joined(*own), weight, (len(own[0]), len(own[1]))))
    return draws


def _joined(text: list[View], image: list[View]) -> list[View]:
    few, many = sorted((text, image), key=len)
    return [_union(a, b) for a, b in zip(few, many)] + many[len(few) :]


def _union(a: View, b: View) -> View:
    hide = a.hide if b.hide is None else b.hide if a.hide is None else a.hide | b.hide
    plain = a.factor is None and b.factor is None
    return View(a.mask | b.mask, hide, None if plain else a.factors.float() + b.factors.float())


def _loss_weight(views: list[View], place: Place, estimator: Estimator) -> Tensor:
    """float32 [B, L]: 1 at scored tokens. If unit is "segment", the scored tokens of a segment have equal weights that
    sum to the number of its sampled tokens."""
    scored = torch.stack([view.scored for view in views]).any(0).float()
    if estimator.unit == "token":
        return scored
    return scored * place.length / place.total(scored).clamp(min=1)


def run_views(
    model: Any,
    canvas: Canvas,
    views: Sequence[View],
    temperature: tuple[float, float] | Tensor = (1.0, 1.0),
    guidance: Guidance | None = None,
) -> Tensor:
    """Log-probabilities float32 [K, B, L] of the tokens that each view scores, 0 elsewhere.

    Views with a visible prompt share a forward pass. A view that hides prompt tokens has its own. A view that scores
    nothing in these rows has none. model: `UnifiedModel` or a wrapper of it; see `UnifiedModel.score`.
    """
    scored_K = torch.stack([view.scored for view in views]).flatten(1).any(1).tolist()
    asked = [k for k, any_scored in enumerate(scored_K) if any_scored] or [0]
    plain = [k for k in asked if views[k].hide is None]
    passes = [[k] for k in asked if views[k].hide is not None]
    if plain:
        passes.insert(0, plain)
    parts = [_one_pass(model, canvas, [views[k] for k in own], temperature, guidance) for own in passes]
    order = torch.tensor([k for own in passes for k in own], device=parts[0].device)
    return parts[0].new_zeros(len(views), *canvas.shape).index_copy(0, order, torch.cat(parts))


def _one_pass(
    model: Any,
    canvas: Canvas,
    views: Sequence[View],
    temperature: tuple[float, float] | Tensor,
    guidance: Guidance | None,
) -> Tensor:
    """Runs only rows with scored tokens."""
    scored_KBL = torch.stack([view.scored for view in views])
    rows = scored_KBL.any(0).any(1).nonzero()[:, 0]
    if 0 < len(rows) < canvas.shape[0]:
        compared = None if guidance is None else guidance.rows(rows)
        warmth = temperature[rows] if isinstance(temperature, Tensor) else temperature
        part = _one_pass(model, canvas.rows(rows), [view.rows(rows) for view in views], warmth, compared)
        return part.new_zeros(scored_KBL.shape).index_copy(1, rows, part)
    mask_KBL = torch.stack([view.mask for view in views])
    return model(canvas, mask_KBL, views[0].hide, temperature, guidance, scored_KBL)


def values_of(
    canvas: Canvas, draw: Draw, logp_KBL: Tensor, text: Estimator, image: Estimator, advantage_BL: Tensor
) -> Tensor:
    """Values float32 [B, L] of the scored tokens, 0 elsewhere, from the log-probabilities of a draw's views. An
    estimator sees only its own views. Raises ValueError if it returns another shape."""
    place, factor_KBL = Place.of(canvas), torch.stack([view.factors.float() for view in draw.views])
    values = []
    for e, count in zip((text, image), draw.counts):
        values.append(e.combine(logp_KBL[:count], factor_KBL[:count], place, advantage_BL))
        check_values(e, "combine", values[-1], canvas.shape)
    value_BL = torch.where(canvas.modality == Modality.IMAGE, values[1], values[0])
    return torch.where(draw.weight != 0, value_BL, 0.0)
