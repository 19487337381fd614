"""What the sampler returns: one response with its stop reason, cost, noise key and settings."""

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

    sequence: prompt and response segments. stop: why it ended. compute: what it cost, by phase. key: its noise key.
    settings: how it was sampled. without: the prompts that guidance compared it with, by what they leave out. writes:
    what the response was to consist of.
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
        """The response alone."""
        return self.sequence.response
