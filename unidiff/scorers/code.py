"""Code that a model wrote: run against tests in a sandbox (unidiff/sandbox), and its form."""

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
_LONGEST = 100_000  # characters of code that is parsed


def judge(sandbox: Sandbox, code: str, row: Any, tolerance: float = 0.0) -> tuple[float | Missing, bool]:
    """Share of the row's tests that code passes, or why that is not known; and whether the code could have forged it,
    since a test had to run beside it. row: see `rows`."""
    try:
        report = rows.judge(sandbox, code, rows.read(row), tolerance)
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
    block: str = "best",
    gated: bool = False,
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
    workers: texts judged at a time; unless given, two more than there are cores, since a sandbox waits as it starts.
    tolerance: relative and absolute, of numbers that a program prints or a function gives.
    block: which of several fenced blocks is the answer: "first", "last" or "best" (see `code_of`).
    gated: 0 for a text without a closed block of code without a syntax error (see `code_format`); nothing of it is run.

    The metric `code_weak` is the share of judged texts whose value their code could have forged.
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
    """The last verdicts, by code, tests and sandbox. Texts of a group are often alike, and a task's figures ask again
    what a reward has asked; so the same code is judged once by the same tests."""

    def __init__(self, most: int = 10_000) -> None:
        self.most, self._lock = most, threading.Lock()
        self._found: OrderedDict[bytes, tuple[float | Missing, bool]] = OrderedDict()

    async def of(self, jobs: Sequence[tuple], pool: ThreadPoolExecutor) -> list[tuple[float | Missing, bool]]:
        """What `judge` says of each job (its arguments); those that are not known are judged in the pool."""
        keys = [_digest(job) for job in jobs]
        with self._lock:
            found = {key: self._found[key] for key in keys if key in self._found}
        new = {key: job for key, job in zip(keys, jobs) if key not in found}
        loop = asyncio.get_running_loop()
        # At the reward's timeout this cancels what has not begun, which would hold up the next batch.
        judged = await asyncio.gather(*(loop.run_in_executor(pool, judge, *job) for job in new.values()))
        found |= zip(new, judged)
        with self._lock:
            for key in new:
                if not isinstance(found[key][0], Missing):  # what could not be judged is tried again
                    self._found[key] = found[key]
            while len(self._found) > self.most:
                self._found.popitem(last=False)
        return [found[key] for key in keys]


def _digest(job: tuple) -> bytes:
    """A key of a job, exact for whatever its row holds; one of its own if that cannot be written down."""
    try:
        return hashlib.sha256(pickle.dumps(job)).digest()
    except Exception:  # an object of the user's may raise anything
        return os.urandom(32)


VERDICTS = Verdicts()


def form_of(text: str, block: str = "best") -> float:
    """1.0 for a text with a closed block of Python that has no syntax error, 0.5 with a syntax error or without an end,
    0.0 without a block. A block without an info string counts."""
    found = block_of(text, block=block)
    if found is None or found.language not in {*PYTHON, ""}:
        return 0.0
    return 1.0 if found.closed and parses(found.code) else 0.5


def parses(code: str) -> bool:
    """Whether code has no syntax error, and any statement. Nothing of it is run."""
    if len(code) > _LONGEST:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in strings
        try:
            return bool(ast.parse(code).body)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return False


def check_block(block: str) -> None:
    if block not in BLOCKS:
        raise ValueError(f"block={block!r}; choose one of {', '.join(BLOCKS)}")


@typed
def code_format(*, block: str = "best", which: str = "last", **options: Any) -> Reward:
    """1 for a closed block of Python without a syntax error, 0.5 with one, 0 for a text without a block. Half of it is
    DiffuCoder's (2506.20639) and MaskGRPO's format reward. MaskGRPO pays for passed tests only from a format of 1, of
    which its largest is 0.5; `code_tests(gated=True)` can be paid."""
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
