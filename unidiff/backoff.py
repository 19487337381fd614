"""Retries with back-off: each pause is twice as long as the one before."""

from __future__ import annotations

import random

FIRST_SECONDS = 0.5
_CHANCE = random.Random()  # not the global generator, which must not change


def pause_before(retry: int) -> float:
    """Seconds before a retry (0 = the first). Randomly shortened by up to half, so that processes spread out."""
    return FIRST_SECONDS * 2**retry * _CHANCE.uniform(0.5, 1.0)
