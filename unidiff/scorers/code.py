"""Rewards for code that a model wrote: tests in a sandbox (unidiff/sandbox), and format."""

from __future__ import annotations

import ast
import asyncio
import hashlib
import os
import pickle
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from unidiff.config import typed
from unidiff.rewards.guard import Value, column_of, each
from unidiff.rewards.names import register
from unidiff.rewards.reward import Cause, Missing, Reward, reward
from unidiff.rewards.segment_view import SegmentView
from unidiff.sandbox import Sandbox, rows
from unidiff.sandbox.fences import PYTHON, block_of, code_of
from unidiff.scorers.text import check_tolerance, check_which, looked_at, text_reward

BLOCKS = ("best", "first", "last")
_LONGEST = 100_000  # maximum characters of code to parse


def judge(sandbox: Sandbox, code: str, row: Any, tolerance: float = 0.0) -> tuple[float | Missing, bool]:
    """The share of the row's tests that the code passes, or `Missing`; and whether the code could have forged the
    result, because a test had to run in its process. row: see `rows`."""
    try:
        report = rows.judge(sandbox, code, rows.read(row), tolerance)
    except Exception as error:  # an error of the sandbox or the row, not of the code
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
    block: str = "best",
    gated: bool = False,
    **options: Any,
) -> Reward:
    """Share of the tests that a text's code passes. The code is a fenced block (`code_of`), or the whole text.

    column: the tests, one of
        ["assert f(2) == 4", …] or one such text             tests (see `Sandbox.test`)
        {"tests": […], "setup": "import math"}               the same, with set-up code for the tests
        {"inputs": […], "outputs": […]}                      a program: inputs to read, outputs to print
        {"fn_name": "f", "inputs": […], "outputs": […]}      a function: arguments and return values
        JSON text of any of these
        None                                                 not applicable
    sandbox: limits for one run; default `Sandbox()`.
    workers: texts judged concurrently; default two more than there are cores, since a sandbox waits while it starts.
    tolerance: relative and absolute, for numbers that a program prints or a function returns.
    block: which of several fenced blocks is the answer: "first", "last" or "best" (see `code_of`).
    gated: a text gets 0, and is not run, unless it has a closed code block without a syntax error (see `code_format`).

    The metric `code_weak` is the share of judged texts whose code could have forged its value.
    """
    check_which(which)
    check_tolerance(tolerance)
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers!r}; it must be 1 or more, or None")
    check_block(block)
    box = sandbox or Sandbox()
    pool = ThreadPoolExecutor(workers or (os.cpu_count() or 1) + 2, "unidiff-code")

    async def code_tests(
        segments: Sequence[SegmentView], log_metric: Callable[[str, float], None] | None = None
    ) -> list[Value]:
        def job(view: SegmentView) -> Any:
            tests = column_of(view, column) if looked_at(view, which) else None
            if tests is None:
                return None
            text = view.text or ""
            return 0.0 if gated and form_of(text, block) < 1 else (box, code_of(text, block=block), tests, tolerance)

        values: list[Any] = each(segments, job, column)
        jobs = {i: one for i, one in enumerate(values) if isinstance(one, tuple)}
        judged = await VERDICTS.of(list(jobs.values()), pool)
        for i, (value, weak) in zip(jobs, judged):
            if isinstance(value, Missing):
                value = Missing(value.cause, f"column {column!r}: {value.message}")
            elif log_metric is not None:
                log_metric("code_weak", float(weak))
            values[i] = value
        return values

    return reward(code_tests, on="text", **options)


class Verdicts:
    """A cache of the latest verdicts, keyed by code, tests and sandbox. It helps because texts of a group are often
    equal, and a task's figures repeat a reward's tests."""

    def __init__(self, most: int = 10_000) -> None:
        self.most, self._lock = most, threading.Lock()
        self._found: OrderedDict[bytes, tuple[float | Missing, bool]] = OrderedDict()

    async def of(self, jobs: Sequence[tuple], pool: ThreadPoolExecutor) -> list[tuple[float | Missing, bool]]:
        """The result of `judge` for each job (its arguments); unknown jobs are judged in the pool."""
        keys = [_digest(job) for job in jobs]
        with self._lock:
            found = {key: self._found[key] for key in keys if key in self._found}
        new = {key: job for key, job in zip(keys, jobs) if key not in found}
        loop = asyncio.get_running_loop()
        # At the reward's timeout this cancels jobs that have not started; they would delay the next batch.
        judged = await asyncio.gather(*(loop.run_in_executor(pool, judge, *job) for job in new.values()))
        found |= zip(new, judged)
        with self._lock:
            for key in new:
                if not isinstance(found[key][0], Missing):  # failed judgements are not cached
                    self._found[key] = found[key]
            while len(self._found) > self.most:
                self._found.popitem(last=False)
        return [found[key] for key in keys]


def _digest(job: tuple) -> bytes:
    """A job's cache key: a hash of its pickle, or random bytes if it cannot be pickled."""
    try:
        return hashlib.sha256(pickle.dumps(job)).digest()
    except Exception:  # the user's objects can raise anything
        return os.urandom(32)


VERDICTS = Verdicts()


def form_of(text: str, block: str = "best") -> float:
    """1.0 for a text with a closed Python block without a syntax error, 0.5 if it has one or is not closed, 0.0 without
    a block. A block without an info string counts as Python."""
    found = block_of(text, block=block)
    if found is None or found.language not in {*PYTHON, ""}:
        return 0.0
    return 1.0 if found.closed and parses(found.code) else 0.5


def parses(code: str) -> bool:
    """Whether code has at least one statement and no syntax error. It is not run."""
    if len(code) > _LONGEST:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as invalid escapes in strings
        try:
            return bool(ast.parse(code).body)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return False


def check_block(block: str) -> None:
    if block not in BLOCKS:
        raise ValueError(f"block={block!r}; choose one of {', '.join(BLOCKS)}")


@typed
def code_format(*, block: str = "best", which: str = "last", **options: Any) -> Reward:
    """1 for a closed Python block without a syntax error, 0.5 with one, 0 for a text without a block. Half of it equals
    the format reward of DiffuCoder (2506.20639) and MaskGRPO. MaskGRPO rewards passed tests only at a format reward of
    1, but its maximum is 0.5; `code_tests(gated=True)` can be earned."""
    check_block(block)
    return text_reward(lambda view: form_of(view.text or "", block), "code_format", which, options)


@typed
def code_syntax(*, block: str = "best", which: str = "last", **options: Any) -> Reward:
    """1 for code (of the fenced block, or the whole text) without a syntax error."""
    check_block(block)
    return text_reward(lambda view: float(parses(code_of(view.text or "", block=block))), "code_syntax", which, options)


for _name, _reward in {
    "code_tests": code_tests(),
    "gated_code_tests": code_tests(gated=True),
    "code_format": code_format(),
    "code_syntax": code_syntax(),
}.items():
    register(_name)(_reward)
