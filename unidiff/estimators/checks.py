"""Validates what an estimator returns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unidiff.canvas import Canvas
from unidiff.estimators.estimator import Ask, Estimator
from unidiff.estimators.view import View


def checked_views(estimator: Estimator, ask: Ask) -> list[View]:
    """An estimator's views, validated, with factor 0 at tokens that are not masked.

    Raises TypeError if it does not return a list of views. Raises ValueError for a tensor of another dtype or shape,
    for masked tokens that are not sampled tokens of the modality, for hidden tokens that are not of the prompt, for a
    factor that is not finite, and for a segment that no view scores, which would silently leave the loss.
    """
    who, canvas, views = _named(estimator), ask.canvas, estimator.views(ask)
    if not isinstance(views, (list, tuple)) or not views or not all(isinstance(view, View) for view in views):
        raise TypeError(f"{who}: views must return a list of View, at least one, not {_kind(views)}")
    for view in views:
        _check_tensor(view.mask, "a mask", canvas, who, torch.bool)
        if view.hide is not None:
            _check_tensor(view.hide, "hide", canvas, who, torch.bool)
        if view.factor is not None:
            _check_tensor(view.factor, "a factor", canvas, who)
    own = [v if v.factor is None else replace(v, factor=v.factor.masked_fill(~v.mask, 0)) for v in views]
    given = canvas.clean.valid & ~canvas.sampled
    scored = torch.stack([view.scored for view in own])
    name = ask.modality.name.lower()
    wrong = {
        f"a mask holds tokens that are not sampled {name} tokens": [v.mask & ~ask.among for v in own],
        "hide holds tokens that are not prompt tokens": [v.hide & ~given for v in own if v.hide is not None],
        "a factor is not finite": [~v.factor.isfinite() for v in own if v.factor is not None],
        "a segment with sampled tokens is not scored": [ask.among & (ask.place.total(scored.any(0).long()) == 0)],
    }
    found = torch.stack([torch.stack(where).any() if where else ask.among.new_zeros(()) for where in wrong.values()])
    for what, is_so in zip(wrong, found.tolist()):  # one wait for the device
        if is_so:
            raise ValueError(f"{who}: {what}")
    return own


def check_values(estimator: object, what: str, values: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `values` is a tensor of this shape. what: the method that returned it."""
    if not isinstance(values, Tensor) or values.shape != shape:
        raise ValueError(f"{_named(estimator)}: {what} must return a tensor {list(shape)}, not {_kind(values)}")


def check_credit(estimator: object, credit_N: Any, advantage_N: Tensor) -> None:
    """Raises ValueError unless `credit_N` has a finite number for each advantage [N]."""
    check_values(estimator, "credit", credit_N, advantage_N.shape)
    if not bool(credit_N.isfinite().all()):
        raise ValueError(f"{_named(estimator)}: credit returned a value that is not finite")


def _named(estimator: object) -> str:
    return f"estimator {type(estimator).__name__}"


def _check_tensor(value: Any, what: str, canvas: Canvas, who: str, dtype: torch.dtype | None = None) -> None:
    if not isinstance(value, Tensor) or value.shape != canvas.shape or dtype not in (None, value.dtype):
        name = "number" if dtype is None else str(dtype).removeprefix("torch.")
        raise ValueError(f"{who}: {what} must be a {name} tensor {list(canvas.shape)}, not {_kind(value)}")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a list of {type(value[0]).__name__}" if value else "an empty list"
    return f"a {type(value).__name__}"
