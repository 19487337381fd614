"""Denoising one segment, step by step: which tokens are drawn, and which of them stay.

A loop knows nothing of sequences or models: it asks `read` for the log-probabilities of what is still masked. It is a
generator that pauses after every step, so that two loops can take turns on one canvas. Noise is counter-based.

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

_TEXT, _ORDER, _IMAGE, _REVEAL, EDIT = range(5)  # what noise is for: the last number of a stream


@dataclass
class Step:
    """One step of a loop. rows: int64 [b], the rows that are not done: no other is read. number: of its block or image,
    from 0. at: the columns at work. again: each row comes so many times, one after another, with other ids."""

    rows: Tensor
    number: int
    at: slice
    again: int = 1


# (ids [b, N] of the step's rows, step) -> log-probabilities [b, columns at work, V]
Read = Callable[[Tensor, Step], Tensor]


@dataclass
class Drawn:
    """Tokens in the making, all [B, N]: ids, the step that committed each (-1 = none), its probability then. warmth:
    the factor that a schedule gave the temperature then; None = none did. trace: for each step taken the probability of
    what was drawn, NaN where nothing was masked; None = it is not kept."""

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
        """Keeps what was drawn in a step, if a trace is wanted. masked: bool, before it."""
        if self.trace is not None:
            row = torch.full_like(self.probability, torch.nan)
            row[step.rows, step.at] = torch.where(masked, log_prob.exp(), torch.nan)
            self.trace.append(row)

    def traced(self, row: int, n: int) -> Tensor | None:
        """[T, n]: the trace of a row's first n tokens, without the steps in which it only waited for other rows."""
        if self.trace is None:
            return None
        steps = torch.stack(self.trace)[:, row] if self.trace else self.probability.new_zeros(0, self.ids.shape[1])
        return steps[~steps.isnan().all(1)][:, :n]

    def commit(self, where: Tensor, ids: Tensor, number: Tensor | int, log_prob: Tensor, step: Step) -> None:
        """where: bool, of the columns and rows at work. number: of the step, as it is kept."""
        new = ((self.ids, ids), (self.step, number), (self.probability, log_prob.exp()))
        self.ids, self.step, self.probability = (_put(old, where, value, step) for old, value in new)

    def steer(self, where: Tensor, choice: Choice, step: Step, steering: Steering | None) -> None:
        """Keeps the temperature of the tokens that a step commits, as a schedule chose it."""
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
    """Each semi-autoregressive block of a canvas: its columns, its planned steps, the most that it takes, and the most
    that those before it take. steered: a schedule may commit one token a step."""
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
    block is full or its text has ended. turn: part of the noise streams, another one for each text of a sequence.
    steering: of a schedule; None = as the settings say."""
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
            rows = (~text_rules.finished(text.ids, masked, end)).nonzero()[:, 0]  # the one host sync of a step
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
            # A stream is numbered by the plan, not by the steps taken: those depend on the rows beside.
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
    """Fills the tokens [B, E] of an image of `whole` tokens that are to be denoised. A row is read for as many steps as
    its tokens take, or until a schedule has committed them all.

    place: [B, E] int64, where in the image each stands. valid: [B, E] bool, False = none, where a row has fewer.
    steering: of a schedule; None = as the settings say.
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
    """Which of an image's tokens a step reveals. All fields of the rows at work: masked [b, E] bool, the number of the
    step, steps and tokens of each row [b], places [b, E], and what the noise depends on."""

    masked: Tensor
    number: int
    steps: Tensor
    total: Tensor
    place: Tensor
    keys: Tensor
    stream: tuple[int, int, int]

    def chosen(self, log_prob: Tensor, config: SamplerConfig) -> Tensor:
        """[b, E] bool: as the settings say."""
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
        """[b, E] bool: as a schedule says, in the order of the sampler; all in a row's last step."""
        if config.image_sampler == "emerge":
            score = noise.uniform(self.keys, self.stream, self.place).float()
        else:
            warmth = 0.0 if config.greedy else config.image_noise
            annealing = ANNEALING[config.image_annealing](self.number, self.steps).float()[:, None]
            score = log_prob + warmth * annealing * noise.gumbel(self.keys, self.stream, self.place)
        last = (self.number >= self.steps - 1)[:, None]
        return steering.commit(choice, self.masked, score) | (self.masked & last)
