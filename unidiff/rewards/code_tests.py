"""Code that a model wrote, run against tests in a sandbox (sandbox.py)."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from unidiff.rewards.reward import Cause, Loss, Reward, register, reward
from unidiff.rewards.segment_view import SegmentView
from unidiff.rewards.text import Value, check_which, looked_at
from unidiff.sandbox import Sandbox, SandboxError

FENCE = re.compile(r"^```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE | re.IGNORECASE)


def code_of(text: str) -> str:
    """The last fenced Python block of a text; the whole text without one."""
    blocks = FENCE.findall(text)
    return blocks[-1] if blocks else text


def judge(sandbox: Sandbox, code: str, tests: Any) -> float | Loss:
    """Share of the tests that the code passes, or why that is not known. tests: see `code_tests`."""
    try:
        if isinstance(tests, dict) and "inputs" in tests:
            return _share_of_outputs(sandbox, code, tests["inputs"], tests["outputs"])
        if isinstance(tests, dict):
            tests, setup = tests["tests"], tests.get("setup", "")
        else:
            setup = ""
        report = sandbox.test(code, [tests] if isinstance(tests, str) else tests, setup)
    except (SandboxError, ValueError, KeyError, TypeError) as error:  # of the sandbox or of the tests, not of the code
        return Loss(Cause.RAISED, f"{type(error).__name__}: {error}")
    if report.unjudged:
        index, why = next(iter(report.unjudged.items()))
        return Loss(Cause.RAISED, f"test {index} cannot judge: {why}")
    return report.rate


def _share_of_outputs(sandbox: Sandbox, code: str, inputs: Sequence[str], outputs: Sequence[str]) -> float:
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs: there must be as many, and at least one")
    right = 0
    for stdin, wanted in zip(inputs, outputs):
        done = sandbox.run(code, stdin)
        right += done.ok and _lines(done.stdout) == _lines(wanted)
    return right / len(inputs)


def _lines(text: str) -> list[str]:
    """Lines without white space at their ends, nor empty ones at the text's end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def code_tests(
    column: str = "tests",
    *,
    sandbox: Sandbox | None = None,
    which: str = "last",
    workers: int | None = None,
    **options: Any,
) -> Reward:
    """Share of the tests that a text's code passes: that of its last fenced block, or the whole text.

    column: what the code is judged by, one of
        ["assert f(2) == 4", …] or one such text    statements, each a test (see `Sandbox.test`)
        {"tests": [...], "setup": "import math"}    the same, with what the tests need
        {"inputs": [...], "outputs": [...]}         a program, by what it prints for what it reads
        None                                        nothing: the text gets None
    sandbox: limits for one run; `Sandbox()` unless given.
    workers: texts judged at a time; one a core unless given.
    """
    check_which(which)
    box = sandbox or Sandbox()
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1, "unidiff-code")

    async def code_tests(segments: Sequence[SegmentView]) -> list[Value]:
        asked = [i for i, s in enumerate(segments) if looked_at(s, which) and s.columns[column] is not None]
        jobs = [(box, code_of(segments[i].text or ""), segments[i].columns[column]) for i in asked]
        loop = asyncio.get_running_loop()
        # At the reward's timeout this cancels what has not begun, which would hold up the next batch.
        judged = await asyncio.gather(*(loop.run_in_executor(pool, judge, *job) for job in jobs))
        values: list[Value] = [None] * len(segments)
        for i, value in zip(asked, judged):
            values[i] = value
        return values

    return reward(code_tests, on="text", **options)


register("code_tests")(code_tests())
