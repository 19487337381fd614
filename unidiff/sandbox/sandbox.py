"""A sandbox for code that a model wrote: a process without rights, without a network, under hard limits.

What it promises, and what it does not, is in docs/scorers.md ("The sandbox"). In short, where the system allows
namespaces: a read-only root with the system's libraries and Python alone, an empty /tmp in memory, no other processes,
no network, a filter of system calls, limits, and an end for all that it starts. `network="allow"` leaves the network
open, and where namespaces are refused goes on with the limits, the filter and Landlock.

Verdicts are exact where the code and what judges it are two processes (judge.py), or else are marked `weak`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

from . import wire
from .process import Ending, Limits, Outcome, Process

REPORT = 2048  # bytes that a verdict may take


@dataclass(frozen=True)
class Case:
    """One call of a function: its arguments, and the values, one of which it has to return."""

    arguments: tuple[Any, ...]
    wanted: tuple[Any, ...]


@dataclass(frozen=True)
class TestReport:
    """passed: one a test. By a test's index: messages: why it did not pass; unjudged: why it says nothing about the
    code; weak: why it had to run beside the code, which could forge its verdict."""

    __test__ = False  # not a test class for pytest

    passed: tuple[bool, ...]
    messages: dict[int, str]
    unjudged: dict[int, str]
    weak: dict[int, str]

    @property
    def rate(self) -> float:
        """Share of the tests that passed."""
        return sum(self.passed) / len(self.passed)


@dataclass(frozen=True)
class Sandbox(Limits):
    """Runs code within its limits (`Limits`)."""

    def run(self, code: str, stdin: str = "") -> Outcome:
        """Runs a program. Raises SandboxError if the sandbox cannot be built."""
        with ExitStack() as stack:
            return Process(self, stack, "program", code, stdin).finish()

    def test(self, code: str, tests: Sequence[str], setup: str = "") -> TestReport:
        """Runs tests of the functions and classes that the code defines.

        tests: texts with statements such as "assert f(2) == 4", test functions or unittest.TestCases; each passes or
        fails as a whole. setup: imports and helpers of the tests.

        The names that a test uses and does not define are those under test. A test that only calls them, hands results
        on and compares plain data is exact. Any other runs beside the code and is `weak`. One that asserts nothing,
        uses nothing of the code, hangs before it calls it, or needs what is not installed or nowhere defined is
        `unjudged`. All tests share `seconds`; but for the last one each may take half of what is left.

        Errors: ValueError without tests; SandboxError if the sandbox cannot be built.
        """
        return self._judge(code, len(tests), tests=list(tests), setup=setup)

    def call(self, code: str, name: str, cases: Sequence[Case], tolerance: float = 0.0) -> TestReport:
        """Calls a function of the code, or a method of its class `Solution`, and compares what it gives.

        Lists equal tuples, and the keys of dictionaries are compared as text, since the values wanted mostly come from
        JSON. tolerance: relative and absolute, of numbers.
        Errors: ValueError without cases, or if one holds what is not plain data (wire.py); SandboxError as in `test`.
        """
        calls = [
            [name, *(wire.encode(list(part), _refuse) for part in (case.arguments, case.wanted))] for case in cases
        ]
        return self._judge(code, len(cases), calls=calls, tolerance=tolerance)

    def programs(self, code: str, pairs: Sequence[tuple[str, str]], tolerance: float = 0.0) -> TestReport:
        """Runs a program for each pair of what it reads and what it is to print; each run may take `seconds`.

        White space at the ends of lines and empty lines at the end do not count. A run that ends with another status
        than 0 fails. tolerance: relative and absolute, of numbers among the words of a line.
        """
        if not pairs:
            raise ValueError("tests is empty: there is nothing to judge by")
        count, wanted = len(pairs), [wanted for _, wanted in pairs]
        job = {"code": code, "inputs": [given for given, _ in pairs], "seconds": self.seconds, "output": self.output}
        output = (6 * self.output + REPORT) * count  # a character takes up to six as JSON
        box = replace(self, seconds=(self.seconds + 1) * count, processes=self.processes + 1, output=output)
        verdicts = {}
        for index, run in enumerate(box._lines("programs", job)):
            if run["stop"] != Ending.EXITED or run["code"] != 0:
                verdicts[index] = {"message": f"{run['stop']}, with {run['code']}"}
            elif not _printed_same(run["stdout"], wanted[index], tolerance):
                verdicts[index] = {"message": f"it printed {run['stdout'][:200]!r}"}
            else:
                verdicts[index] = {"passed": True}
        return _report(verdicts, count)

    def _judge(self, code: str, count: int, **job: Any) -> TestReport:
        if not count:
            raise ValueError("tests is empty: there is nothing to judge by")
        # The tests' process and two beside the code come on top of the code's own.
        output = max(self.output, REPORT * count)
        box = replace(self, seconds=self.seconds + 1, processes=self.processes + 3, output=output)
        given = {"code": code, "seconds": self.seconds, "tests": [], "setup": "", "calls": [], "tolerance": 0.0}
        job = given | job
        return _report({words["test"]: words for words in box._lines("tests", job)}, count)

    def _lines(self, mode: str, job: dict[str, Any]) -> list[dict[str, Any]]:
        """What a job reports, one JSON line each. Raises SandboxError if it could not begin."""
        with ExitStack() as stack:
            outcome = Process(self, stack, mode, json.dumps(job)).finish()
        found = []
        for line in outcome.stdout.splitlines():
            with suppress(ValueError):  # the last line may be cut off
                found.append(json.loads(line))
        return found


def _refuse(value: Any) -> Any:
    raise ValueError(f"{value!r:.100} is not plain data: a {type(value).__name__}")


def _report(verdicts: dict[int, dict[str, Any]], count: int) -> TestReport:
    """A test without a verdict has not passed."""
    found = [verdicts.get(index, {"message": "it was stopped before it had a verdict"}) for index in range(count)]
    notes = {key: {i: one[key] for i, one in enumerate(found) if key in one} for key in ("message", "unjudged", "weak")}
    passed = tuple(one.get("passed", False) for one in found)
    return TestReport(passed, notes["message"], notes["unjudged"], notes["weak"])


def _printed_same(printed: str, wanted: str, tolerance: float) -> bool:
    """Equal but for white space at the ends of lines and empty lines at the end; numbers within the tolerance."""
    ours, theirs = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (printed, wanted))
    if ours == theirs or tolerance <= 0 or len(ours) != len(theirs):
        return ours == theirs
    words = [(a.split(), b.split()) for a, b in zip(ours, theirs)]
    return all(len(a) == len(b) and all(map(_close, a, b, [tolerance] * len(a))) for a, b in words)


def _close(printed: str, wanted: str, tolerance: float) -> bool:
    try:
        return printed == wanted or math.isclose(float(printed), float(wanted), rel_tol=tolerance, abs_tol=tolerance)
    except ValueError:
        return False
