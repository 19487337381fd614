"""The interface of log-probability estimators.

A masked diffusion model has no cheap exact probability of a whole text or image. An estimator defines one or several
views. In a view some tokens are masked, the others are visible, and the model scores the masked ones. The estimator
combines the log-probabilities into one value per token or per segment. Masks are data: they are drawn once per batch of
rollouts, and the old, the reference and the new policy are scored on the same masks.

A method is a frozen dataclass in its own file, registered by name:

    @register("mine")
    @dataclass(frozen=True)
    class Mine(Estimator):
        rate: float = 0.5

        def views(self, ask):
            return [View(ask.among & (ask.uniform() < self.rate))]

Dimensions: B rows, L columns of `Canvas.clean`, K views.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unidiff import noise
from unidiff.canvas import Canvas
from unidiff.config import check_fields
from unidiff.estimators.view import Place, View
from unidiff.sequence import Modality

# First number of every noise stream here, so that none is shared with the sampler ("view" in ASCII).
_STREAM = 0x76696577
_PROMPT = 2  # replaces the modality in streams of prompt tokens
_SEGMENT_STRIDE = 1 << 32  # noise counter of a token = segment · stride + offset; larger than any segment's length


@dataclass(frozen=True)
class Ask:
    """One inner iteration's request to an estimator: views of the sampled tokens of one modality.

    canvas: the rollouts [B, L]. place: `Place.of(canvas)`. modality: of the tokens to mask. iteration: 0 …
    iterations-1. keys_B: int64 [B], the rows' noise keys. key: the step's noise key, for noise that all rows share.
    """

    canvas: Canvas
    place: Place
    modality: Modality
    iteration: int
    iterations: int
    keys_B: Tensor
    key: int = 0

    @cached_property
    def among(self) -> Tensor:
        """bool [B, L]: the sampled tokens of the modality. Masks are subsets of it."""
        return self.canvas.sampled & (self.canvas.modality == self.modality)

    @cached_property
    def prompt(self) -> Tensor:
        """bool [B, L]: content tokens of the segments before the first segment with sampled tokens."""
        segment, clean = self.canvas.segment, self.canvas.clean
        last = torch.iinfo(segment.dtype).max
        first = torch.where(self.canvas.sampled, segment, last).amin(1, keepdim=True)
        return clean.valid & (clean.offset >= 0) & (segment < first)

    @property
    def rank(self) -> Tensor:
        """int64 [B, L]: a token's index among the sampled tokens of its segment, from 0."""
        return self.place.rank

    @property
    def length(self) -> Tensor:
        """int64 [B, L]: the number of sampled tokens in a column's segment."""
        return self.place.length

    def uniform(self, *stream: int) -> Tensor:
        """float64 [B, L] in (0, 1): one number per content token.

        It is a function of the row's key, the iteration, the modality, the stream, and the token's segment and offset.
        It does not depend on the column, the padding or the batch. stream: distinguishes several draws of a method.
        """
        return self._uniform(self.canvas.clean.offset, int(self.modality), *stream)

    def segment_uniform(self, *stream: int) -> Tensor:
        """float64 [B, L] in (0, 1): one number per segment, the same at all of its columns. See `uniform`."""
        return self._uniform(_SEGMENT_STRIDE - 1, int(self.modality), *stream)  # an offset that no token has

    def prompt_uniform(self, *stream: int) -> Tensor:
        """As `uniform`, but the same for both modalities. If the text and the image estimator both hide prompt tokens
        with probability p, a token is then hidden with probability p, not 1 − (1−p)²."""
        return self._uniform(self.canvas.clean.offset, _PROMPT, *stream)

    def step_uniform(self, *stream: int) -> float:
        """A number in (0, 1), the same for all rows and inner iterations of a step."""
        return float(noise.uniform(noise.keys(_STREAM, self.key), (int(self.modality), *stream), 1))

    def _uniform(self, offset: Tensor | int, *stream: int) -> Tensor:
        counter = self.canvas.segment * _SEGMENT_STRIDE + offset
        return noise.uniform(self.keys_B.to(counter.device), (_STREAM, self.iteration, *stream), counter)


class Estimator:
    """Base of all methods. A method defines `views`.

    unit: "token": each token has its own value. "segment": all scored tokens of a segment share one value and one
    ratio, and the segment counts in the loss as if all of its sampled tokens were scored.
    ratio: True: the loss is GRPO's, with the importance ratio of new to old policy. False: the loss is
    −advantage · value of the current policy; there is no old policy and no clipping.
    joint: the values of a segment's tokens sum to its log-probability, or to a bound of it. `rtb` needs this.

    Fields are checked against their types. A subclass with a `__post_init__` calls `super().__post_init__()` first.
    """

    unit: ClassVar[Literal["token", "segment"]] = "token"
    ratio: ClassVar[bool] = True
    joint: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self, f"{type(self).__name__}.")

    @property
    def by_token(self) -> bool:
        """Whether a token's value is the sum of its own log-probabilities in the views."""
        return self.unit == "token" and type(self).combine is Estimator.combine

    def views(self, ask: Ask) -> list[View]:
        """The views of one inner iteration, the same number for every row. Together they must score at least one token
        of each segment that has sampled tokens of the modality."""
        raise NotImplementedError(f"{type(self).__name__} must define views")

    def combine(self, logp_KBL: Tensor, factor_KBL: Tensor, place: Place, advantage_BL: Tensor) -> Tensor:
        """Values float32 [B, L] from the log-probabilities of this method's views: Σ_k factor · ℓ, summed over the
        segment if unit is "segment". It must be differentiable and must not mix segments.

        factor_KBL: float, the views' factors, 0 where a token is not scored. advantage_BL: float, each token's
        advantage, as returned by `credit`.
        """
        value_BL = (logp_KBL * factor_KBL).sum(0)
        return place.total(value_BL) if self.unit == "segment" else value_BL

    def credit(self, advantage_N: Tensor, group_N: Tensor) -> Tensor:
        """float32 [N]: replaces the advantages of N segments in the loss. group_N: int64, equal for segments that are
        compared: the k-th segments of a modality in the rollouts of one prompt."""
        return advantage_N
