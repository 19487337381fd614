"""A sandbox for code that a model wrote: a process without rights, without a network, under hard limits.

What it promises where the system allows namespaces (the default, `network="deny"`, insists on them):

- A root of its own: the system's libraries and Python, read-only; a few devices; an empty /tmp in memory. No /etc,
  /home, /proc, nor any other file of the machine, so neither the trainer's environment nor its processes can be seen.
- Its own process, network, ipc and host name namespaces, no capabilities, no further namespaces; as root's child it
  becomes nobody.
- A filter of system calls (filter.py): no memory that no limit counts, no sockets of families that know no
  network namespace, none of the kernel's corners.
- Hard limits: wall clock, CPU seconds, address space, number of processes, open files, size of files, size of /tmp and
  files in it, and of what it prints. When it ends or is stopped, the kernel kills everything that it started.
- Verdicts that it cannot forge, where they are exact. Output is compared in the trainer's process; functions are called
  in one process and judged in another, which gets plain data alone (judge.py). Tests that look at objects of the code
  run beside it and are marked `weak`: code that attacks its own test can forge them.

It does not promise to stop an attack on the kernel itself, or timing channels. Limits hold for each process: at worst
`processes` times `memory` are used, and `disk` once more.

`network="allow"` leaves the network open; and where namespaces are refused (many containers), it runs with the limits
and the filter alone, and with Landlock, which restricts files, where the kernel has it. Then other processes can be
seen, though neither traced nor signalled, and `disk` bounds each file, not their sum.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

from . import wire
from .process import Limits, Outcome, Process, SandboxError, Stop

REPORT = 2048  # bytes that a verdict may take


@dataclass(frozen=True)
class Case:
    """One call of a function: its arguments, and the values of which it has to give one."""

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
    stop: Stop

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
            process = Process(self, stack, {"mode": "program", "code": code}, stdin=stdin)
            return process.finish()

    def test(self, code: str, tests: Sequence[str], setup: str = "") -> TestReport:
        """Runs tests of the functions and classes that the code defines.

        tests: texts with statements such as "assert f(2) == 4", test functions or unittest.TestCases; each passes or
        fails as a whole. setup: imports and helpers of the tests.

        The names that a test uses and does not define are those under test. A test that only calls them, hands results
        on and compares plain data is exact. Any other runs beside the code and is `weak`. One that asserts nothing, uses
        nothing of the code, or needs what is not installed is `unjudged`.

        Errors: ValueError without tests; SandboxError if the sandbox cannot be built.
        """
        return self._judge(code, len(tests), tests=list(tests), setup=setup)

    def call(self, code: str, name: str, cases: Sequence[Case], tolerance: float = 0.0) -> TestReport:
        """Calls a function of the code, or a method of its class `Solution`, and compares what it gives.

        Lists equal tuples, and the keys of dictionaries are compared as text, since the values wanted mostly come from
        JSON. tolerance: relative and absolute, of numbers.
        Errors: ValueError without cases, or if one holds what is not plain data (wire.py); SandboxError as in `test`.
        """
        calls = [[name, wire.encode(list(case.arguments), _refuse), wire.encode(list(case.wanted), _refuse)] for case in cases]
        return self._judge(code, len(cases), calls=calls, tolerance=tolerance)

    def _judge(self, code: str, count: int, **job: Any) -> TestReport:
        if not count:
            raise ValueError("tests is empty: there is nothing to judge by")
        # The tests' process and one beside the code come on top of the code's own.
        box = replace(self, processes=self.processes + 2, output=max(self.output, REPORT * count))
        given = json.dumps({"code": code, "tests": [], "setup": "", "calls": [], "tolerance": 0.0, **job})
        with ExitStack() as stack:
            outcome = Process(box, stack, {"mode": "tests"}, stdin=given).finish()
        return _report(outcome, count)


def _refuse(value: Any) -> Any:
    raise ValueError(f"{value!r:.100} is not plain data: a {type(value).__name__}")


def _report(outcome: Outcome, count: int) -> TestReport:
    """The verdicts of the judging process; a test without one has not passed."""
    verdicts: dict[int, dict[str, Any]] = {}
    for line in outcome.stdout.splitlines():
        with suppress(ValueError):  # the last line may be cut off
            words = json.loads(line)
            if "broken" in words:
                raise SandboxError(words["broken"])
            verdicts[words["test"]] = words
    late = {"passed": False, "message": f"no verdict: {outcome.stop}"}
    found = [verdicts.get(index, late) for index in range(count)]
    notes = {
        key: {index: one[key] for index, one in enumerate(found) if key in one} for key in ("message", "unjudged", "weak")
    }
    passed = tuple(one.get("passed", False) for one in found)
    return TestReport(passed, notes["message"], notes["unjudged"], notes["weak"], outcome.stop)
