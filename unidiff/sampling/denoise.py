"""Denoising loops of one segment: each step draws tokens and commits some of them.

A loop does not depend on sequences or models: it calls `read` for log-probabilities. It is a generator that yields
after every step, so that two loops can take turns on one canvas. Noise is counter-based.

Dimensions: B rows, N tokens of a text's canvas, E tokens of an image to denoise, V words.
"""

from __future__ import annotations

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
from unidiff.schedules.schedule import Choice, Look
from unidiff.schedules.steering import Steering, warmed
from unidiff.sequence import Modality

if TYPE_CHECKING:
    from unidiff.sampling.config import SamplerConfig
    from unidiff.spec import ModelSpec

_TEXT, _ORDER, _IMAGE, _REVEAL, EDIT = range(5)  # the last number of a noise stream: its purpose


@dataclass
class Step:
    """One step of a loop. rows: int64 [b], the unfinished rows; only these are read. number: the step's index in its
    block or image, from 0. at: the active columns. again: each row is repeated this many times, with different ids."""

    rows: Tensor
    number: int
    at: slice
    again: int = 1


# (ids [b, N] of the step's rows, step) -> log-probabilities [b, active columns, V]
Read = Callable[[Tensor, Step], Tensor]


@dataclass
class Drawn:
    """The state of a loop, all [B, N]: ids, the step that committed each token (-1 = none), and its probability then.
    warmth: a schedule's factor on the temperature then; None = no schedule set it. trace: for each step the probability
    of the drawn token, NaN where none was masked; None = not recorded."""

    ids: Tensor
    step: Tensor
    probability: Tensor
    warmth: Tensor | None = None
    trace: list[Tensor] | None = None

    @classmethod
    def nothing(cls, like: Tensor, mask: int, trace: bool = False) -> Drawn:
        """All masked."""
        ones = torch.ones(like.shape, device=like.device)
        return cls(torch.full_like(like, mask), torch.full_like(like, -1), ones, trace=[] if trace else None)

    def note(self, masked: Tensor, log_prob: Tensor, step: Step) -> None:
        """Records a step's drawn probabilities, if there is a trace. masked: bool, before the step."""
        if self.trace is not None:
            row = torch.full_like(self.probability, torch.nan)
            row[step.rows, step.at] = torch.where(masked, log_prob.exp(), torch.nan)
            self.trace.append(row)

    def traced(self, row: int, n: int) -> Tensor | None:
        """[T, n]: the trace of a row's first n tokens, without steps in which the row was already finished."""
        if self.trace is None:
            return None
        steps = torch.stack(self.trace)[:, row] if self.trace else self.probability.new_zeros(0, self.ids.shape[1])
        return steps[~steps.isnan().all(1)][:, :n]

    def commit(self, where: Tensor, ids: Tensor, number: Tensor | int, log_prob: Tensor, step: Step) -> None:
        """Commits ids. where: bool, over the step's rows and columns. number: the step index to record."""
        new = ((self.ids, ids), (self.step, number), (self.probability, log_prob.exp()))
        self.ids, self.step, self.probability = (_put(old, where, value, step) for old, value in new)

    def steer(self, where: Tensor, choice: Choice, step: Step, steering: Steering | None) -> None:
        """Records a schedule's temperature for the tokens that a step commits."""
        if steering is not None:
            steering.committed(where.sum(1))
        if choice.temperature is not None:
            old = torch.ones_like(self.probability) if self.warmth is None else self.warmth
            self.warmth = _put(old, where, choice.temperature[:, None], step)

    def map(self, f: Callable[[Tensor], Tensor]) -> Drawn:
        trace = None if self.trace is None else [f(t) for t in self.trace]
        warmth = None if self.warmth is None else f(self.warmth)
        return Drawn(f(self.ids), f(self.step), f(self.probability), warmth, trace)


def _put(old: Tensor, where: Tensor, value: Tensor | int, step: Step) -> Tensor:
    out = old.clone()
    out[step.rows, step.at] = torch.where(where, value, old[step.rows, step.at])
    return out


def text_blocks(size: int, config: SamplerConfig, steered: bool = False) -> Iterator[tuple[slice, int, int, int]]:
    """The semi-autoregressive blocks of a canvas: columns, planned steps, maximum steps, and the sum of maximum steps
    of earlier blocks. steered: a schedule may commit one token per step."""
    first, width = 0, min(config.text_block or size, size)
    for start in range(0, size, width):
        n = min(width, size - start)
        planned, most = text_rules.planned_steps(n, size, config)
        most = n if steered else most
        yield slice(start, start + n), planned, most, first
        first += most


def denoise_text(
    text: Drawn,
    read: Read,
    keys_B: Tensor,
    turn: int,
    config: SamplerConfig,
    spec: ModelSpec,
    steering: Steering | None = None,
) -> Iterator[None]:
    """Fills the masked tokens of a text's canvas [B, N], up to each row's first end token. A row is read until its
    block is full or its text has ended. turn: the text's index in the response; it separates noise streams. steering:
    by a schedule; None = follow the settings."""
    low = spec.text_range[0]
    end = torch.tensor(spec.text_end, dtype=torch.int64, device=text.ids.device)
    greedy = config.greedy or not config.text_temperature
    columns = torch.arange(text.ids.shape[1], device=text.ids.device)
    taken = torch.zeros(len(text.ids), dtype=torch.int64, device=text.ids.device)  # steps of each row
    for at, planned, most, first in text_blocks(len(columns), config, steering is not None):
        place = columns[at]
        inside = (columns >= at.start) & (columns < at.stop)
        for number in range(most):
            masked = (text.ids == spec.mask) & inside
            rows = (~text_rules.finished(text.ids, masked, end)).nonzero()[:, 0]  # the only host sync of a step
            if not len(rows):
                break
            step = Step(rows, number, at)
            ids, masked, keys = text.ids[rows], masked[rows], keys_B[rows]
            log_probs = read(ids, step)
            share = forbid_mask(log_probs, spec)
            choice = Choice()
            if steering is not None:
                progress = torch.full(rows.shape, (first + number) / len(columns), device=rows.device)
                look = Look(Modality.TEXT, progress, masked[:, at], torch.full_like(rows, len(place)), log_probs)
                choice = steering.decide(rows, first + number, look)
            if choice.temperature is not None:
                log_probs, share = warmed(log_probs, choice), torch.zeros_like(share)
            # Number streams by the plan, not by the steps taken, which depend on the other rows.
            uniform = noise.uniform(keys, (turn, first + number, _TEXT), place)
            drawn, sure = draw(log_probs, uniform, greedy)
            log_prob = sure - share
            ids[:, at] = torch.where(masked[:, at], drawn + low, ids[:, at])
            free = text_rules.eligible(ids, masked, end)[:, at]
            random = config.text_order == "random"
            order = noise.uniform(keys, (turn, first + number, _ORDER), place) if random else uniform
            block = text_rules.Block(masked[:, at], free, drawn, sure.exp(), log_probs, order)
            if steering is not None and choice.commits:
                commit = steering.commit(choice, free, block.sure)
                commit = text_rules.apart(commit, block.sure, block.masked, config)
            else:
                commit = text_rules.chosen(block, number, planned, config)
            text.note(masked[:, at], log_prob, step)
            text.commit(commit, drawn + low, taken[rows, None], log_prob, step)
            text.steer(commit, choice, step, steering)
            taken[rows] += 1
            yield


def forbid_mask(log_probs: Tensor, spec: ModelSpec) -> Tensor:
    """Removes the mask token from [B, n, V] log-probabilities, in place; returns log(1 − its probability), [B, n].

    A token is never the mask. But confidence is measured before the removal, as in the reference implementations.
    """
    low, high = spec.text_range
    if not low <= spec.mask < high:
        return log_probs.new_zeros(log_probs.shape[:2])
    left = torch.log1p(-log_probs[..., spec.mask - low].exp())
    log_probs[..., spec.mask - low] = -torch.inf
    return left


def text_length(ids: Tensor, spec: ModelSpec) -> Tensor:
    """[B] length of each text in its canvas [B, N], including its end token; N if there is no end token."""
    end = torch.isin(ids, torch.tensor(spec.text_end, dtype=torch.int64, device=ids.device))
    return torch.where(end.any(1), end.int().argmax(1) + 1, ids.shape[1])


def denoise_image(
    image: Drawn,
    read: Read,
    keys_B: Tensor,
    turn: int,
    config: SamplerConfig,
    spec: ModelSpec,
    place: Tensor,
    valid: Tensor,
    whole: int,
    steering: Steering | None = None,
) -> Iterator[None]:
    """Fills the tokens [B, E] to denoise, of an image of `whole` tokens. A row is read for its number of steps, or
    until a schedule has committed all its tokens.

    place: [B, E] int64, index in the image. valid: [B, E] bool, False = padding, where a row has fewer tokens.
    steering: by a schedule; None = follow the settings.
    """
    count_B = valid.sum(1)
    steps_B = image_rules.edit_steps(count_B, whole, config.image_steps)
    planned = steps_B.masked_fill(count_B == 0, 0).tolist()
    for number in range(max(planned)):
        rows = torch.tensor([i for i, n in enumerate(planned) if n > number], device=place.device)
        if steering is not None:
            rows = rows[(valid & (image.step < 0))[rows].any(1)]
            if not len(rows):
                break
        step = Step(rows, number, slice(None))
        keys, steps = keys_B[rows], steps_B[rows]
        log_probs = read(image.ids[rows], step)
        masked = valid[rows] & (image.step[rows] < 0)
        choice = Choice()
        if steering is not None:
            look = Look(Modality.IMAGE, (number / steps).float(), masked, count_B[rows], log_probs)
            choice = steering.decide(rows, number, look)
        uniform = noise.uniform(keys, (turn, number, _IMAGE), place[rows])
        drawn, log_prob = draw(warmed(log_probs, choice), uniform, config.greedy)
        reveal = _Reveal(masked, number, steps, count_B[rows], place[rows], keys, (turn, number, _REVEAL))
        if steering is not None and choice.commits:
            commit = reveal.steered(steering, choice, log_prob, config)
        else:
            commit = reveal.chosen(log_prob, config)
        image.note(masked, log_prob, step)
        image.commit(commit, drawn + spec.image_offset, number, log_prob, step)
        image.steer(commit, choice, step, steering)
        yield


@dataclass
class _Reveal:
    """Chooses the image tokens that a step reveals. Fields, of the step's rows: masked [b, E] bool, the step's index,
    each row's steps and tokens [b], places [b, E], and the keys and stream of the noise."""

    masked: Tensor
    number: int
    steps: Tensor
    total: Tensor
    place: Tensor
    keys: Tensor
    stream: tuple[int, int, int]

    def chosen(self, log_prob: Tensor, config: SamplerConfig) -> Tensor:
        """[b, E] bool: by the settings."""
        schedule = SCHEDULES[config.image_schedule]
        if config.image_sampler == "emerge":
            appears = noise.uniform(self.keys, self.stream, self.place)
            return image_rules.emerge_commit(self.masked, self.number, self.steps, schedule, appears)
        return image_rules.maskgit_commit(
            self.masked,
            log_prob,
            self.number,
            self.steps,
            self.total,
            schedule,
            0.0 if config.greedy else config.image_noise,
            noise.gumbel(self.keys, self.stream, self.place),
            ANNEALING[config.image_annealing],
        )

    def steered(self, steering: Steering, choice: Choice, log_prob: Tensor, config: SamplerConfig) -> Tensor:
        """[b, E] bool: by a schedule, in the sampler's order; all tokens in a row's last step."""
        if config.image_sampler == "emerge":
            score = noise.uniform(self.keys, self.stream, self.place).float()
        else:
            warmth = 0.0 if config.greedy else config.image_noise
            annealing = ANNEALING[config.image_annealing](self.number, self.steps).float()[:, None]
            score = log_prob + warmth * annealing * noise.gumbel(self.keys, self.stream, self.place)
        last = (self.number >= self.steps - 1)[:, None]
        return steering.commit(choice, self.masked, score) | (self.masked & last)
