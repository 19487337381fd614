"""Runs of the recipes' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def without_curves() -> Iterator[None]:
    """Runs of a test draw no curves, which takes longer than their steps. Those of a module's fixtures do, for they are
    begun before; curves themselves: tests/report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unidiff.run.draw_curves", lambda *given, **options: None)
        patch.setattr("unidiff.report.page.draw_panels", lambda *given, **options: [])
        yield
