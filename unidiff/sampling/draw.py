"""Drawing tokens from log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(log_probs: Tensor, uniform: Tensor, greedy: bool = False) -> tuple[Tensor, Tensor]:
    """Draws exactly from each distribution by inverse CDF, or takes its mode.

    log_probs: [..., V] float32, -inf = impossible. uniform: [...] float64 in (0, 1), unused if greedy. Returns the
    index [...] int64, and its log-probability [...] float32. An index of probability 0 is never returned (unless all
    have it).

    Gumbel-max needs V noise numbers per token; this needs one. Also, float32 Gumbel noise cannot exceed 17, which cuts
    off the tail; float64 sums and uniforms reach words of probability 1e-15.
    """
    mode = log_probs.argmax(-1)
    index = mode
    if not greedy:
        cumulative = log_probs.exp().cumsum(-1, dtype=torch.float64)
        level = uniform[..., None] * cumulative[..., -1:]
        index = torch.searchsorted(cumulative, level)[..., 0]  # the first with cumulative >= level
        index = index.clamp(max=log_probs.shape[-1] - 1)  # all NaN; `check_drawn` reports it
        # A parallel sum rounds unevenly, so on a GPU it may increase at an index of probability 0.
        possible = log_probs.gather(-1, index[..., None])[..., 0] > -torch.inf
        index = index.where(possible, mode)
    return index, log_probs.gather(-1, index[..., None])[..., 0]


def check_drawn(probability: Tensor) -> None:
    """Raises FloatingPointError if a token was drawn from NaN. Synchronises with the device, so call it once per
    finished segment."""
    if bool(probability.isnan().any()):
        raise FloatingPointError(
            "the model's log-probabilities are NaN: a temperature or guidance is extreme, or the weights ran away"
        )
