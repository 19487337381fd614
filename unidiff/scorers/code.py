"""Code that a model wrote, run against tests in a sandbox (unidiff/sandbox)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from unidiff.config import typed
from unidiff.rewards.guard import Value, column_of, each
from unidiff.rewards.names import register
from unidiff.rewards.reward import Cause, Missing, Reward, reward
from unidiff.rewards.segment_view import SegmentView
from unidiff.sandbox import Sandbox, rows
from unidiff.sandbox.fences import code_of
from unidiff.scorers.text import check_tolerance, check_which, looked_at


def judge(sandbox: Sandbox, text: str, row: Any, tolerance: float = 0.0) -> tuple[float | Missing, bool]:
    """Share of the row's tests that a text's code passes, or why that is not known; and whether the code could have
    forged it, since a test had to run beside it. row: see `rows`."""
    try:
        report = rows.judge(sandbox, code_of(text), rows.read(row), tolerance)
    except Exception as error:  # of the sandbox or of the row, not of the code
        return Missing(Cause.RAISED, f"{type(error).__name__}: {error}"), False
    if report.unjudged:
        index, why = next(iter(report.unjudged.items()))
        return Missing(Cause.RAISED, f"test {index} is not judged: {why}"), False
    return report.rate, bool(report.weak)


@typed
def code_tests(
    column: str = "tests",
    *,
    sandbox: Sandbox | None = None,
    which: str = "last",
    workers: int | None = None,
    tolerance: float = 0.0,
    **options: Any,
) -> Reward:
    """Share of the tests that a text's code passes: that of its fenced block (`code_of`), or the whole text.

    column: what the code is judged by, one of
        ["assert f(2) == 4", …] or one such text             tests (see `Sandbox.test`)
        {"tests": […], "setup": "import math"}               the same, with what the tests need
        {"inputs": […], "outputs": […]}                      a program, by what it prints for what it reads
        {"fn_name": "f", "inputs": […], "outputs": […]}      a function, by its arguments and values
        JSON text of any of these
        None                                                 nothing: the text gets None
    sandbox: limits for one run; `Sandbox()` unless given.
    workers: texts judged at a time; one a core unless given.
    tolerance: relative and absolute, of numbers that a program prints or a function gives.

    The metric `code_weak` is the share of judged texts whose value their code could have forged.
    """
    check_which(which)
    check_tolerance(tolerance)
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers!r}; it must be 1 or more, or None")
    box = sandbox or Sandbox()
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1, "unidiff-code")

    async def code_tests(
        segments: Sequence[SegmentView], log_metric: Callable[[str, float], None] | None = None
    ) -> list[Value]:
        def job(view: SegmentView) -> tuple[Any, ...] | None:
            tests = column_of(view, column) if looked_at(view, which) else None
            return None if tests is None else (box, view.text or "", tests, tolerance)

        values: list[Any] = each(segments, job, column)
        jobs = {i: one for i, one in enumerate(values) if isinstance(one, tuple)}
        loop = asyncio.get_running_loop()
        # At the reward's timeout this cancels what has not begun, which would hold up the next batch.
        judged = await asyncio.gather(*(loop.run_in_executor(pool, judge, *one) for one in jobs.values()))
        for i, (value, weak) in zip(jobs, judged):
            if isinstance(value, Missing):
                value = Missing(value.cause, f"column {column!r}: {value.message}")
            elif log_metric is not None:
                log_metric("code_weak", float(weak))
            values[i] = value
        return values

    return reward(code_tests, on="text", **options)


register("code_tests")(code_tests())
