"""The cost of a rollout by phase: forward passes, token-forwards, FLOPs and seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Cost:
    """forwards: passes through the model. token_forwards: tokens that went through it, without pads and without rows
    that are already finished, so that a rollout costs the same in any batch. flops: analytic. seconds: wall clock of
    the batch, divided by its rows."""

    forwards: float = 0.0
    token_forwards: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self.values(), other.values())))

    def scaled(self, factor: float) -> Cost:
        return Cost(*(v * factor for v in self.values()))

    def values(self) -> tuple[float, float, float, float]:
        return self.forwards, self.token_forwards, self.flops, self.seconds

    def to_dict(self) -> dict[str, float]:
        return dict(zip(("forwards", "token_forwards", "flops", "seconds"), self.values()))


PICTURE_PHASES = ("select", "image", "write_image")


class Compute(dict[str, Cost]):
    """Cost by phase: prompt (read once, shared by all samples of the prompt), text, select (choosing the tokens to
    edit), image, write_text and write_image (reading finished segments into the cache)."""

    @property
    def total(self) -> Cost:
        return sum(self.values(), Cost())

    @property
    def pictures(self) -> Cost:
        """The cost of pictures: choosing tokens, denoising them, and reading each finished picture into the cache."""
        return sum((self[phase] for phase in PICTURE_PHASES if phase in self), Cost())

    def __add__(self, other: Compute) -> Compute:
        return Compute({k: self.get(k, Cost()) + other.get(k, Cost()) for k in {**self, **other}})

    def scaled(self, factor: float) -> Compute:
        return Compute({k: v.scaled(factor) for k, v in self.items()})


@dataclass
class ModelFlops:
    """FLOPs of one forward over N tokens with K visible keys each: 2·P·N + 4·layers·d·N·K, plus 2·d·rows for each
    position with logits (algorithms §6). P: parameters of the body's blocks."""

    parameters: int
    layers: int
    d_model: int

    @classmethod
    def of(cls, backbone: Any) -> ModelFlops:
        blocks = sum(p.numel() for p in backbone.model.layers.parameters())
        return cls(blocks, backbone.config.num_hidden_layers, backbone.config.hidden_size)

    def forward(self, tokens: Tensor, keys: Tensor, positions: Tensor, rows: int) -> Tensor:
        """FLOPs of each row of a batch, int64 as `tokens`, `keys` and `positions` [B]. rows: of the LM head."""
        body = 2 * self.parameters * tokens + 4 * self.layers * self.d_model * tokens * keys
        return body + 2 * self.d_model * rows * positions


@dataclass
class ComputeMeter:
    """Adds up the cost of a batch of rollouts. Counts stay on the device until `rows` reads them."""

    flops: ModelFlops
    batch: int
    device: torch.device
    counts: dict[str, Tensor] = field(default_factory=dict)  # phase -> [3, batch]: forwards, tokens, flops
    seconds: dict[str, float] = field(default_factory=dict)

    def add(
        self, phase: str, rows: Tensor, tokens: Tensor, keys: Tensor, positions: Tensor, head: int, active: Tensor
    ) -> None:
        """Counts one forward pass of `rows` (indices into the batch). All [len(rows)]: tokens that run, keys visible to
        each, positions with logits over `head` rows of the LM head (int64); active, the rows to count (bool)."""
        if phase not in self.counts:
            self.counts[phase] = torch.zeros(3, self.batch, dtype=torch.float64, device=self.device)
        flops = self.flops.forward(tokens, keys, positions, head)
        # A row that comes again, with other ids, is read in the same pass.
        first = torch.cat([torch.ones_like(rows[:1]), (rows[1:] != rows[:-1]).long()])
        values = torch.stack([first, tokens, flops]).double()
        self.counts[phase].index_add_(1, rows, values * active)

    def share(self, phase: str, group: int) -> None:
        """Spreads a phase's cost evenly over each `group` of neighbouring rows."""
        if phase in self.counts:
            mean = self.counts[phase].unflatten(1, (-1, group)).mean(2)
            self.counts[phase] = mean.repeat_interleave(group, 1)

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Measures wall-clock seconds of a phase; synchronises with the device only at its end."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def rows(self) -> list[Compute]:
        """The cost of each row; seconds are shared evenly."""
        counts = {phase: c.T.tolist() for phase, c in self.counts.items()}
        phases = {**self.counts, **self.seconds}
        zero = [[0.0, 0.0, 0.0]] * self.batch

        def cost(phase: str, row: int) -> Cost:
            forwards, tokens, flops = counts.get(phase, zero)[row]
            return Cost(forwards, tokens, flops, self.seconds.get(phase, 0.0) / self.batch)

        return [Compute({p: cost(p, i) for p in phases}) for i in range(self.batch)]
