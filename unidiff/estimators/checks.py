"""What an estimator must give, told as soon as it gives something else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unidiff.estimators.view import Place, View
from unidiff.sequence import Canvas, Modality


def checked_views(
    estimator: object, views: Any, hide: Any, canvas: Canvas, place: Place, modality: Modality
) -> list[View]:
    """An estimator's views, all of them ready to use: factors are 0 where nothing is masked, and prompt tokens that the
    method hides (`hide`, bool [B, L] or None) are hidden in each view that does not say so itself.

    Raises TypeError for what are no views, ValueError for tensors of another kind or shape, tokens that are not the
    method's to mask or to hide, factors that are not finite, and segments of which nothing is scored: they would leave
    the loss without a word.
    """
    who = _named(estimator)
    if not isinstance(views, (list, tuple)) or not views or not all(isinstance(view, View) for view in views):
        raise TypeError(f"{who}: views must give a list of View, at least one, not {_kind(views)}")
    own = [view if view.hide is not None else replace(view, hide=hide) for view in views]
    for view in own:
        _check_tensor(view.mask, "a mask", canvas, who, torch.bool)
        if view.hide is not None:
            _check_tensor(view.hide, "hide", canvas, who, torch.bool)
        if view.factor is not None:
            _check_tensor(view.factor, "a factor", canvas, who)
    own = [v if v.factor is None else replace(v, factor=v.factor.masked_fill(~v.mask, 0)) for v in own]
    among = canvas.sampled & (canvas.modality == modality)
    given = canvas.clean.valid & ~canvas.sampled
    scored = torch.stack([view.scored for view in own])
    wrong = {
        f"a mask holds tokens that are no sampled {modality.name.lower()} tokens": [v.mask & ~among for v in own],
        "hide holds tokens that are no prompt tokens": [v.hide & ~given for v in own if v.hide is not None],
        "a factor is not finite": [~v.factor.isfinite() for v in own if v.factor is not None],
        "a segment with sampled tokens is not scored": [among & (place.total(scored.any(0).long()) == 0)],
    }
    found = torch.stack([torch.stack(where).any() if where else among.new_zeros(()) for where in wrong.values()])
    for what, is_so in zip(wrong, found.tolist()):  # one wait for the device
        if is_so:
            raise ValueError(f"{who}: {what}")
    return own


def check_values(estimator: object, what: str, values: Any, shape: tuple[int, ...]) -> None:
    """Of `combine`. Raises ValueError for another shape."""
    if not isinstance(values, Tensor) or values.shape != shape:
        raise ValueError(f"{_named(estimator)}: {what} must give a tensor {list(shape)}, not {_kind(values)}")


def check_credit(estimator: object, credit_N: Any, advantage_N: Tensor) -> None:
    """Raises ValueError if there is not a finite number for each of the advantages [N]."""
    check_values(estimator, "credit", credit_N, advantage_N.shape)
    if not bool(credit_N.isfinite().all()):
        raise ValueError(f"{_named(estimator)}: credit gave what is not finite")


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
