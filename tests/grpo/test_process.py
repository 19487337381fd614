"""What a process takes of the machine."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unidiff.grpo.process import share_cores


@pytest.mark.parametrize(
    ("variable", "processes", "threads", "expected"),
    [
        ("1", 1, None, 1),
        ("3", 1, None, 3),
        ("3", 1, 2, 2),
        ("", 1, None, os.cpu_count()),
        ("many", 1, None, os.cpu_count()),
        ("1", 2, None, max((os.cpu_count() or 1) // 2, 1)),  # as torchrun sets it
    ],
)
def test_threads_are_those_that_were_asked_for(
    monkeypatch: Any, variable: str, processes: int, threads: int | None, expected: int
) -> None:
    """A control beside a run must not take its core."""
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    before = torch.get_num_threads()
    try:
        share_cores(SimpleNamespace(device=torch.device("cpu"), num_processes=processes), threads)  # type: ignore[arg-type]
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
