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
- A verdict that it cannot forge. Output is compared here, in the trainer's process; functions are tested by a process
  of their own (see payload.py).

It does not promise to stop an attack on the kernel itself, or timing channels. Limits hold for each process: at worst
`processes` times `memory` are used, and `disk` once more.

`network="allow"` leaves the network open; and where namespaces are refused (many containers), it runs with the limits
and the filter alone, and with Landlock, which restricts files, where the kernel has it (a table in docs/scorers.md says
what holds on which kernel). Then other processes can be seen, though neither traced nor signalled, and `disk` bounds
each file, not their sum.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from .process import Limits, Outcome, Process, SandboxError, Stop, pipe


@dataclass(frozen=True)
class TestReport:
    """passed: one a test. messages: why not, by the test's index. unjudged: tests that cannot judge, by index."""

    __test__ = False  # no test class for pytest

    passed: tuple[bool, ...]
    messages: dict[int, str]
    unjudged: dict[int, str]
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
        """Runs tests against the functions and classes that the code defines.

        tests: statements, such as "assert f(2) == 4". setup: imports and helpers of the tests.

        The names that tests and set-up use and do not define are those under test. Arguments and results cross as
        plain data (numbers, strings, bytes, None, lists, tuples, sets, dictionaries, iterators as their items); other
        results stay behind as handles, whose methods can be called. A test that hands over a function or an
        object of its own cannot judge, and is counted as `unjudged`.

        Errors: ValueError without tests; SandboxError if the sandbox cannot be built or the set-up itself fails.
        """
        if not tests:
            raise ValueError("tests is empty: there is nothing to judge by")
        with ExitStack() as stack:
            requests, replies, verdicts = (pipe(stack) for _ in range(3))
            shared: dict[str, Any] = {"setup": setup, "tests": list(tests), "names": free_names([setup, *tests])}
            ends = {"requests": requests[0], "replies": replies[1]}
            functions = Process(self, stack, {"mode": "functions", "code": code}, pipes=ends, quiet=True)
            ends = {"requests": requests[1], "replies": replies[0], "verdicts": verdicts[1]}
            judge = Process(self, stack, {"mode": "tests", **shared}, pipes=ends)
            for fd in (*requests, *replies, verdicts[1]):
                os.close(fd)
            outcome = judge.finish(watch=verdicts[0])
            functions.kill()
            functions.check()
            return _report(bytes(judge.watched), len(tests), outcome)


def free_names(sources: Sequence[str]) -> list[str]:
    """Names that pieces of code use and neither define nor find among the builtins. Broken pieces have none."""
    used: set[str] = set()
    bound: set[str] = set(dir(builtins))
    for source in sources:
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in nodes:
            if isinstance(node, ast.Name):
                (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                bound.add(node.name)
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
            elif isinstance(node, ast.alias):
                bound.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, ast.ExceptHandler) and node.name:
                bound.add(node.name)
    return sorted(used - bound)


def _report(verdicts: bytes, count: int, outcome: Outcome) -> TestReport:
    """The verdicts of the judging process; a test without one has not passed."""
    passed = [False] * count
    messages = dict.fromkeys(range(count), f"no verdict: {outcome.stop}")
    unjudged: dict[int, str] = {}
    for line in verdicts.splitlines():
        words = json.loads(line)
        if "broken" in words:
            raise SandboxError(words["broken"])
        index = words["test"]
        messages.pop(index)
        if "unjudged" in words:
            unjudged[index] = words["unjudged"]
        elif not words["passed"]:
            messages[index] = words["message"]
        passed[index] = words.get("passed", False)
    return TestReport(tuple(passed), messages, unjudged, outcome.stop)
