"""unidiff.timing: what is timed, by a clock that the test holds."""

from __future__ import annotations

import torch

from unidiff import timing


def test_the_fastest_repeat_counts_and_the_first_run_does_not(monkeypatch):
    costs, now = iter([1.0, 9.0, 5.0, 7.0]), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def run() -> None:
        now[0] += next(costs)

    assert timing.seconds_of(run, repeats=3) == 5.0


def test_a_rate_is_the_products_operations_in_their_time(monkeypatch):
    now = [0.0]

    def clock() -> float:  # each run lasts one tick
        now[0] += 0.5
        return now[0]

    monkeypatch.setattr("time.perf_counter", clock)
    assert timing.matrix_rate(8, dtype=torch.float64) == 2 * 8**3 / 0.5
