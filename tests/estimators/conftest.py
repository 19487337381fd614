from __future__ import annotations

from collections.abc import Iterator

import pytest

from unidiff.estimators import ESTIMATORS


@pytest.fixture
def registry() -> Iterator[None]:
    """What a test registers is forgotten afterwards."""
    before = dict(ESTIMATORS)
    yield
    ESTIMATORS.clear()
    ESTIMATORS.update(before)
