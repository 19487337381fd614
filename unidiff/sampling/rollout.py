"""The sampler's result: one response with its stop reason, cost, noise key and settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from unidiff.sampling.compute import Compute
from unidiff.sampling.config import SamplerConfig
from unidiff.sequence import Interleaved, Writes


class Stop(Enum):
    """Why a rollout ended."""

    ANSWERED = "a text ended with the end token of a response"
    NO_END = "a text filled its canvas without an end token"
    MAX_ROUNDS = "another image was announced after the last round"
    DRAWN = "the last part of a plan is a picture, and it is drawn"


@dataclass
class Rollout:
    """One sampled response.

    sequence: prompt and response segments. stop: the stop reason. compute: cost by phase. key: noise key. settings: how
    it was sampled. without: the prompts that guidance used, by what they leave out. writes: the requested kind of
    response.
    """

    sequence: Interleaved
    stop: Stop
    compute: Compute
    key: int
    settings: SamplerConfig
    without: Mapping[str, Interleaved] = field(default_factory=dict)
    writes: Writes = "interleaved"

    @property
    def segments(self) -> Interleaved:
        """The response's segments."""
        return self.sequence.response
