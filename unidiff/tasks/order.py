"""The order of examples: a function of the seed and the place in the run, so that every run can be resumed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from unidiff import noise

if TYPE_CHECKING:
    from unidiff.tasks.task import Place

_PROMPT = 1 << 21  # noise stream of the choice of training prompts
_ENDLESS = 1 << 30


def endless(place: Place) -> int:
    """A random index below 2**30, for a task that makes its examples."""
    return int(noise.uniform(noise.keys(place.seed, place.step, place.prompt), (_PROMPT,), 1) * _ENDLESS)


def permuted(place: Place, size: int) -> int:
    """An index below `size`: every epoch is a new permutation of all indices."""
    epoch, at = divmod(place.number, size)
    return int(_order(place.seed, epoch, size)[at])


@functools.lru_cache(maxsize=4)  # called for every prompt of an epoch
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, _PROMPT]).permutation(size)
