"""Greedy texts with fewer forward passes, and the same tokens: steps are drafted, and verified together.

A pass gives the log-probabilities of one state of a text. Applied again and again, they draft the states that the next
steps would reach if the model did not change its mind. The next pass reads all of them, as rows of one batch. The first
is right. Each that follows is right if the step from the one before, taken with its own log-probabilities, leads to it.
So every step that is kept is the step that one pass a step would have taken, whatever the commit rule.

Source: self-speculative decoding (arXiv 2510.04147), which drafts one token a step; here a step commits what the
sampler's rule says. It pays where a pass of K rows takes less time than K passes: on a GPU, for few rows.

Dimensions: B rows at work, K states, N tokens of a text's canvas, n of a block, V words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unidiff.sampling import text as text_rules
from unidiff.sampling.denoise import Drawn, Read, Step, denoise_text, forbid_mask, text_blocks
from unidiff.sampling.draw import draw

if TYPE_CHECKING:
    from unidiff.sampling.config import SamplerConfig
    from unidiff.schedules.steering import Steering
    from unidiff.spec import ModelSpec


def text_loop(
    text: Drawn,
    read: Read,
    keys_B: Tensor,
    turn: int,
    config: SamplerConfig,
    spec: ModelSpec,
    steering: Steering | None,
) -> Iterator[None]:
    """The loop that the settings ask for; see `denoise_text`. Sampled texts, those that a schedule steers, and those
    whose probabilities are traced take a pass a step."""
    greedy = config.greedy or not config.text_temperature
    if config.text_ahead > 1 and greedy and steering is None and text.trace is None:
        return denoise_ahead(text, read, config, spec)
    return denoise_text(text, read, keys_B, turn, config, spec, steering)


def denoise_ahead(text: Drawn, read: Read, config: SamplerConfig, spec: ModelSpec) -> Iterator[None]:
    """Fills the masked tokens of a text's canvas [B, N] as `denoise_text` does with the same greedy settings. Pauses
    after each pass."""
    taken = torch.zeros(len(text.ids), dtype=torch.int64, device=text.ids.device)  # steps of each row
    for at, planned, most, _ in text_blocks(text.ids.shape[1], config):
        yield from _Block(text, read, config, spec, taken, at, planned, most).run()


class _Block:
    """One block. number: int64 [rows], steps of each row in it."""

    def __init__(
        self,
        text: Drawn,
        read: Read,
        config: SamplerConfig,
        spec: ModelSpec,
        taken: Tensor,
        at: slice,
        planned: int,
        most: int,
    ) -> None:
        self.text, self.read, self.config, self.spec, self.taken = text, read, config, spec, taken
        self.at, self.planned, self.most = at, planned, most
        self.end = torch.tensor(spec.text_end, dtype=torch.int64, device=text.ids.device)
        self.number = torch.zeros_like(taken)

    def run(self) -> Iterator[None]:
        last: Tensor | None = None
        rows, passes = self._left(torch.arange(len(self.text.ids), device=self.text.ids.device)), 0
        while len(rows):
            states = [self.text.ids[rows]]
            if last is not None:
                for ahead in range(self.config.text_ahead - 1):
                    commit, drawn = self._step(states[-1], self.number[rows] + ahead, last)
                    states.append(_put(states[-1], commit, drawn, self.at))
            both = torch.stack(states, 1)  # [B, K, N]
            step = Step(rows.repeat_interleave(len(states)), passes, self.at, len(states))
            found = self.read(both.flatten(0, 1), step).unflatten(0, both.shape[:2])
            last, passes = self._verified(rows, both, found), passes + 1
            yield
            left = self._left(rows)
            last, rows = last[torch.isin(rows, left)], left

    def _left(self, rows: Tensor) -> Tensor:
        """The rows that are not done with the block."""
        ids = self.text.ids[rows]
        done = text_rules.finished(ids, self._masked(ids), self.end) | (self.number[rows] >= self.most)
        return rows[~done]

    def _masked(self, ids: Tensor) -> Tensor:
        column = torch.arange(ids.shape[1], device=ids.device)
        return (ids == self.spec.mask) & (column >= self.at.start) & (column < self.at.stop)

    def _step(self, ids: Tensor, number: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """What a step from a state [B, N] commits, bool [B, n], and the tokens that it draws, ids [B, n]. number: int64
        [B], of the step. log_probs: [B, n, V]."""
        index, sure = draw(log_probs, log_probs[..., 0], greedy=True)
        masked, drawn = self._masked(ids), index + self.spec.text_range[0]
        filled = _put(ids, masked[:, self.at], drawn, self.at)
        free = text_rules.eligible(filled, masked, self.end)[:, self.at]
        block = text_rules.Block(masked[:, self.at], free, index, sure.exp(), log_probs, sure)
        return text_rules.chosen(block, number[:, None], self.planned, self.config), drawn

    def _verified(self, rows: Tensor, states: Tensor, log_probs: Tensor) -> Tensor:
        """Takes the steps from the states [B, K, N] that are right. Returns the log-probabilities [B, n, V] of the last
        right state of each row."""
        right = torch.ones_like(rows, dtype=torch.bool)
        last = log_probs[:, 0].clone()
        for k in range(states.shape[1]):
            now = log_probs[right, k]
            share = forbid_mask(now, self.spec)
            commit, drawn = self._step(self.text.ids[rows[right]], self.number[rows[right]], now)
            last[right] = now
            log_prob = now.gather(2, (drawn - self.spec.text_range[0])[..., None])[..., 0] - share
            step = Step(rows[right], k, self.at)
            self.text.commit(commit, drawn, self.taken[rows[right], None], log_prob, step)
            self.taken[rows[right]] += 1
            self.number[rows[right]] += 1
            if k + 1 < states.shape[1]:
                going = torch.isin(rows, self._left(rows))
                right = right & going & (self.text.ids[rows] == states[:, k + 1]).all(1)
            if not bool(right.any()):
                break
        return last


def _put(ids: Tensor, where: Tensor, drawn: Tensor, at: slice) -> Tensor:
    out = ids.clone()
    out[:, at] = torch.where(where, drawn, out[:, at])
    return out
