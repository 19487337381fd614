"""Denoising one segment, step by step: which tokens are drawn, and which of them stay.

A loop knows nothing of sequences or models: it asks `read` for the log-probabilities of what is still masked. It is a
generator that pauses after every step, so that two loops can take turns on one canvas. Noise is counter-based.

Dimensions: B rows, N tokens of a text's canvas, E tokens of an image to denoise, V words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unidiff import noise
from unidiff.sampling import image as image_rules
from unidiff.sampling import text as text_rules
from unidiff.sampling.draw import draw
from unidiff.sampling.schedules import ANNEALING, SCHEDULES

if TYPE_CHECKING:
    from unidiff.sampling.config import SamplerConfig
    from unidiff.spec import ModelSpec

_TEXT, _ORDER, _IMAGE, _REVEAL, EDIT = range(5)  # what noise is for: the last number of a stream

# (ids [B, N], columns at work, whether it is their first step, rows [B] that are not done) -> [B, columns, V]
ReadText = Callable[[Tensor, slice, bool, Tensor], Tensor]
# (ids [B, E], rows [B] that are not done) -> [B, E, V]
ReadImage = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Drawn:
    """Tokens in the making, all [B, N]: ids, the step that committed each (-1 = none), its probability then. trace: for
    each step taken the probability of what was drawn, NaN where nothing was masked; None = it is not kept."""

    ids: Tensor
    step: Tensor
    probability: Tensor
    trace: list[Tensor] | None = None

    @classmethod
    def nothing(cls, like: Tensor, mask: int, trace: bool = False) -> Drawn:
        """All masked."""
        ones = torch.ones(like.shape, device=like.device)
        return cls(torch.full_like(like, mask), torch.full_like(like, -1), ones, [] if trace else None)

    def note(self, masked: Tensor, log_prob: Tensor, at: slice = slice(None)) -> None:
        """Keeps what was drawn in a step, if a trace is wanted. masked: bool, before the step, of the columns `at`."""
        if self.trace is not None:
            row = torch.full_like(self.probability, torch.nan)
            row[:, at] = torch.where(masked, log_prob.exp(), torch.nan)
            self.trace.append(row)

    def traced(self, row: int, n: int) -> Tensor | None:
        """[T, n]: the trace of a row's first n tokens, without the steps in which it only waited for other rows."""
        if self.trace is None:
            return None
        steps = torch.stack(self.trace)[:, row] if self.trace else self.probability.new_zeros(0, self.ids.shape[1])
        return steps[~steps.isnan().all(1)][:, :n]

    def commit(self, where: Tensor, ids: Tensor, step: Tensor | int, log_prob: Tensor, at: slice = slice(None)) -> None:
        """where: bool, of the columns `at`."""
        new = ((self.ids, ids), (self.step, step), (self.probability, log_prob.exp()))
        self.ids, self.step, self.probability = (_put(old, where, value, at) for old, value in new)

    def map(self, f: Callable[[Tensor], Tensor]) -> Drawn:
        trace = None if self.trace is None else [f(t) for t in self.trace]
        return Drawn(f(self.ids), f(self.step), f(self.probability), trace)


def _put(old: Tensor, where: Tensor, value: Tensor | int, at: slice) -> Tensor:
    out = old.clone()
    out[:, at] = torch.where(where, value, old[:, at])
    return out


def text_blocks(size: int, config: SamplerConfig) -> Iterator[tuple[slice, int, int]]:
    """Each semi-autoregressive block of a canvas: its columns, its steps, and the steps planned before it."""
    first, width = 0, min(config.text_block or size, size)
    for start in range(0, size, width):
        n = min(width, size - start)
        steps = n if config.text_threshold is not None else math.ceil(config.text_steps * n / size)
        yield slice(start, start + n), steps, first
        first += steps


def denoise_text(
    text: Drawn, read: ReadText, keys_B: Tensor, turn: int, config: SamplerConfig, spec: ModelSpec
) -> Iterator[None]:
    """Fills the masked tokens of a text's canvas [B, N], up to each row's first end token. turn: part of the noise
    streams, another one for each text of a sequence."""
    size, low = text.ids.shape[1], spec.text_range[0]
    end = torch.tensor(spec.text_end, dtype=torch.int64, device=text.ids.device)
    greedy = config.greedy or not config.text_temperature
    taken = torch.zeros(len(text.ids), dtype=torch.int64, device=text.ids.device)  # steps of each row
    for at, steps, first in text_blocks(size, config):
        place = torch.arange(size, device=text.ids.device)[at]
        inside = torch.zeros(size, dtype=torch.bool, device=text.ids.device)
        inside[at] = True
        for step in range(steps):
            masked = (text.ids == spec.mask) & inside
            active = ~text_rules.finished(text.ids, masked, end)
            if not bool(active.any()):  # the one host sync of a step: it saves every forward after the last token
                break
            log_probs = read(text.ids, at, step == 0, active)
            share = _forbid_mask(log_probs, spec)
            # A stream is numbered by the plan, not by the steps taken: those depend on the rows beside.
            uniform = noise.uniform(keys_B, (turn, first + step, _TEXT), place)
            drawn, sure = draw(log_probs, uniform, greedy)
            log_prob = sure - share
            candidate = _put(text.ids, masked[:, at], drawn + low, at)
            free = text_rules.eligible(candidate, masked, end)[:, at]
            if config.text_threshold is not None:
                commit = text_rules.commit_threshold(sure.exp(), free, config.text_threshold)
            else:
                order = noise.uniform(keys_B, (turn, first + step, _ORDER), place)
                score = text_rules.confidence(config.text_order, log_probs, drawn, order)
                commit = text_rules.commit_top(score, free, text_rules.commit_count(masked, step, steps))
            text.note(masked[:, at] & active[:, None], log_prob, at)
            text.commit(commit, drawn + low, taken[:, None], log_prob, at)
            taken = taken + active
            yield


def _forbid_mask(log_probs: Tensor, spec: ModelSpec) -> Tensor:
    """Takes the mask token out of [B, n, V] log-probabilities, in place; returns the log of what is left, [B, n].

    It is not a value of a token. But as in the references its share counts where the model is asked how sure it is.
    """
    low, high = spec.text_range
    if not low <= spec.mask < high:
        return log_probs.new_zeros(log_probs.shape[:2])
    left = torch.log1p(-log_probs[..., spec.mask - low].exp())
    log_probs[..., spec.mask - low] = -torch.inf
    return left


def text_length(ids: Tensor, spec: ModelSpec) -> Tensor:
    """[B] length of each text in its canvas [B, N], with its end token; all of it where there is none."""
    end = torch.isin(ids, torch.tensor(spec.text_end, dtype=torch.int64, device=ids.device))
    return torch.where(end.any(1), end.int().argmax(1) + 1, ids.shape[1])


def denoise_image(
    image: Drawn,
    read: ReadImage,
    keys_B: Tensor,
    turn: int,
    config: SamplerConfig,
    spec: ModelSpec,
    place: Tensor,
    valid: Tensor,
    whole: int,
) -> Iterator[None]:
    """Fills the tokens [B, E] of an image of `whole` tokens that are to be denoised.

    place: [B, E] int64, where in the image each stands. valid: [B, E] bool, False = none, where a row has fewer.
    """
    count = valid.sum(1)
    steps_B = image_rules.edit_steps(count, whole, config.image_steps)
    schedule = SCHEDULES[config.image_schedule]
    for step in range(int(steps_B.max())):
        active = (count > 0) & (step < steps_B)
        log_probs = read(image.ids, active)
        uniform = noise.uniform(keys_B, (turn, step, _IMAGE), place)
        drawn, log_prob = draw(log_probs, uniform, config.greedy)
        masked, reveal = valid & (image.step < 0), (turn, step, _REVEAL)
        if config.image_sampler == "emerge":
            appears = noise.uniform(keys_B, reveal, place)
            commit = image_rules.emerge_commit(masked, step, steps_B, schedule, appears)
        else:
            commit = image_rules.maskgit_commit(
                masked,
                log_prob,
                step,
                steps_B,
                count,
                schedule,
                0.0 if config.greedy else config.image_noise,
                noise.gumbel(keys_B, reveal, place),
                ANNEALING[config.image_annealing],
            )
        image.note(masked, log_prob)
        image.commit(commit, drawn + spec.image_offset, step, log_prob)
        yield
