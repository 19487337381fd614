"""Runs tests on code: apart from it where that is exact (exact.py), else beside it (weak.py). One verdict a test.

Everything here has read the tests, so the process of the code is started before they are read.
"""

import ast
import builtins
import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import candidate
import exact
import translate
import weak
import wire

AGAIN_SECONDS = 0.5  # a test that takes all exceptions is told again
UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


def judge(text, reports):
    """Reads the job: {"code", "tests", "setup", "calls", "tolerance", "seconds"}. A line for each verdict goes to
    reports."""
    link = exact.Link()
    job = json.load(text)
    candidate.silence()
    for index, verdict in enumerate(Judge(link, job).verdicts()):
        candidate.send(reports, json.dumps({"test": index, **verdict}).encode() + b"\n")
        candidate.reap()


class Unjudged(Exception):
    """This test says nothing about the code, or needs what is not here."""


class Late(BaseException):
    """A test's time is over."""


def late(*_):
    raise Late("it was stopped before it had a verdict")


class Judge:
    """Tests and the code, read. named: what the tests use of the code."""

    def __init__(self, link, job):
        self.link, self.job, self.space = link, job, None
        link.send(job["code"])
        self.end = time.monotonic() + job["seconds"]
        self.left = len(job["calls"]) + len(job["tests"])
        signal.signal(signal.SIGALRM, late)

    def verdicts(self) -> Iterator[dict[str, Any]]:
        """One verdict a call or test."""
        for case in self.job["calls"]:
            yield self.timed(self.call, *(wire.decode(part) for part in case))
        if not self.job["tests"]:
            return
        setup: Any = attempt(translate.Piece, self.job["setup"])
        pieces = [attempt(self.piece, text, setup) for text in self.job["tests"]]
        readable = [piece for piece in (setup, *pieces) if isinstance(piece, translate.Piece)]
        self.setup: Any = setup
        self.modules = translate.modules(readable, attempt(translate.Piece, self.job["code"]))
        names = set().union(*(piece.names for piece in readable)) - self.modules.keys()
        names -= getattr(setup, "defined", set())
        self.named = frozenset(names or translate.tested_builtins(readable))
        for piece in pieces:
            yield {"unjudged": str(piece)} if isinstance(piece, Unjudged) else self.timed(self.verdict, piece)

    def timed(self, judge, *given):
        """A verdict, within half of the time that is left; the last one has all of it."""
        time_left = self.end - time.monotonic()
        self.left -= 1
        try:
            signal.setitimer(signal.ITIMER_REAL, max(time_left / (2 if self.left else 1), 0.01), AGAIN_SECONDS)
            return judge(*given)
        except Late as error:
            return {"passed": False, "message": str(error)}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def piece(self, text, setup):
        if isinstance(setup, Unjudged):
            raise Unjudged(f"the set-up: {setup}")
        piece = translate.Piece(text)
        if not translate.asserts(piece, setup):
            raise Unjudged("it asserts nothing")
        for name in translate.fixtures(piece, setup):
            raise Unjudged(f"it needs the fixture {name}, which is not defined")
        for node in piece.tree.body:
            for name in imports(node):
                if name != translate.SOLUTION and translate.library(name) is None:
                    raise Unjudged(f"it imports {name}, which is not installed; the sandbox has `paths` for packages")
        return piece

    def verdict(self, piece) -> dict[str, Any]:
        if not piece.used & (self.named | self.setup.defined | {translate.SOLUTION}):
            return {"unjudged": "it uses nothing of the code"}
        link = self.link
        if link.ended:
            return self.weakly(piece, "the code has ended its own process")
        if self.space is None:
            self.space = {"__name__": "test"} | {name: exact.Name(link, name) for name in self.named}
            provide(self.modules, self.space)
            found = self.exactly(self.setup, self.space)
            if found.get("passed") is False or "unjudged" in found:
                self.space = None
                return found
            self.setup_weak = found.get("weak")
        found = {"weak": self.setup_weak} if self.setup_weak else self.exactly(piece, dict(self.space))
        if not found.get("passed") and "unjudged" not in found and (missing := self.missing(piece)):
            return {"unjudged": missing}
        return self.weakly(piece, found["weak"]) if "weak" in found else found

    def missing(self, piece):
        """What nobody defines, beside a name that the code does define."""
        names = sorted(piece.names & self.named - piece.imports.keys())
        if len(names) < 2 or self.link.ended:
            return None
        known = self.link.defined(names)
        unknown = [name for name in names if name not in known]
        return f"neither the code nor the test defines {unknown[0]}" if known and unknown else None

    # --- apart ---

    def exactly(self, piece, space) -> dict[str, Any]:
        """Runs a piece apart from the code, or says why it has to run beside it."""
        link = self.link
        link.begin()
        why = translate.shares_interpreter(piece)
        if why:
            return {"weak": why}
        try:
            space |= {own: exact.Name(link, name) for own, name in piece.imports.items()}
            run(piece, translate.Noted(), space, link.names())
            error = None
        except BaseException as raised:
            error = raised
        if isinstance(error, Late):
            link.stop()
            if not link.calls:
                return {"unjudged": "it does not end, and has not called the code yet"}
        elif link.reason or ((link.handles or link.shared) and (error or link.failed)):
            kept = "the test looks at an object of the code" if link.handles else "the code keeps what it got or gave"
            return {"weak": link.reason or kept}
        elif isinstance(error, SystemExit) and not error.code and link.calls and link.raised is not error:
            error = None  # the test has ended itself
        if error is None and (link.failed or link.open):
            error = AssertionError("an assertion that the test itself has caught")
        if error is None:
            return {"passed": True}
        if link.failed or link.raised is error or isinstance(error, AssertionError | Late):
            return {"passed": False, "message": described(error)}
        if not link.calls and not isinstance(error, TypeError):  # as a name gives that is neither called nor asked
            return {"unjudged": ("the set-up: " if piece is self.setup else "") + described(error)}
        return {"weak": "it fails for another reason than an assertion"}

    # --- beside ---

    def weakly(self, piece, why):
        """Runs a test in a new interpreter beside the code; a new one for each test."""
        code = attempt(ast.parse, self.job["code"])
        refused = str(code) if isinstance(code, Unjudged) else weak.trick(code)
        if refused:
            return {"passed": False, "weak": why, "message": refused}
        ours, theirs = os.pipe()
        token = os.urandom(16)
        child = os.fork()
        if child == 0:
            self.beside(piece, theirs, token)
        os.close(theirs)
        said = b""
        try:
            os.waitpid(child, 0)
            os.set_blocking(ours, False)
            said = os.read(ours, 4096)
        except BlockingIOError:
            pass
        except Late:
            for kill in (os.killpg, os.kill):  # its group, which it may not have made yet
                with contextlib.suppress(ProcessLookupError):
                    kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        finally:
            os.close(ours)
        if said == token:
            return {"passed": True, "weak": why}
        ended = not said.startswith(token)
        message = "the code has ended the test" if ended else said[len(token) :].decode(errors="replace")
        return {"passed": False, "weak": why, "message": message}

    def beside(self, piece, report, token):
        """Writes the token to report, with the reason if the test fails. Does not return."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        guard = weak.Guard(self.named | piece.defined | self.setup.defined)
        try:
            os.setpgid(0, 0)
            candidate.alone(report)
            self.run_beside(piece, guard)
            failure = "AssertionError" if guard.failed or guard.open else ""
        except BaseException as error:
            failure = described(error) or "it fails"
        guard.leave(False)
        os.write(report, token + failure.encode(errors="replace")[:2000])
        os._exit(0)

    def run_beside(self, piece, guard):
        genuine = {name: getattr(builtins, name) for name in translate.GENUINE} | guard.names()
        before = dict(sys.modules)
        module = candidate.module_of(self.job["code"], translate.SOLUTION)
        sys.modules.update(before)
        space = module.__dict__
        for name in self.named - space.keys():
            with contextlib.suppress(NameError):
                space[name] = candidate.found(module, name)
        provide(self.modules, space)
        for one in (self.setup, piece):
            space |= {own: space[name] for own, name in one.imports.items() if name in space}
            run(one, translate.Guarded(self.named | one.defined | self.setup.defined), space, genuine)

    # --- calls ---

    def call(self, name, arguments, wanted):
        """One call of a function by its arguments, and the value that it is to give."""
        link = self.link
        link.begin()
        try:
            value = link.call(name, arguments, {}, items=True)
            right = any(same(value, one, self.job["tolerance"]) for one in wanted)
        except Late:
            link.stop()
            raise
        except BaseException as error:
            return {"passed": False, "message": described(error)}
        return {"passed": True} if right else {"passed": False, "message": f"it gave {value!r:.200}"}


def attempt(read: Any, *given: Any) -> Any:
    """What a function gives, or an Unjudged that says why it cannot read its text."""
    try:
        return read(*given)
    except Unjudged as error:
        return error
    except UNREADABLE as error:
        return Unjudged(described(error))


def provide(modules, space):
    for statement in modules.values():
        exec(statement, space)


def run(piece, transformer, space, objects):
    """Runs a test's statements, then the test functions and classes that it defines, with objects as in `program`."""
    if "unittest" in sys.modules:
        vars(sys.modules["unittest"])["main"] = lambda *_, **__: None
    exec(translate.program(piece, transformer, objects), space)
    for name in piece.cases:
        for call in calls_of(space[name], space):
            call()


def calls_of(case, space):
    if isinstance(case, type):
        if any(kind.__module__.startswith("unittest") for kind in case.__mro__):
            return [lambda: run_cases(case)]
        methods = [name for name in dir(case) if name.startswith("test")]
        return [call for name in methods for call in calls_of(method_of(case, name), space)]
    if getattr(case, "fixture", False):
        return []
    code = case.__code__
    parameters = code.co_varnames[: code.co_argcount]
    given = {name: fixture(space[name]) for name in parameters if getattr(space.get(name), "fixture", False)}
    return [lambda row=row: case(**given, **row) for row in getattr(case, "cases", [{}])]


def method_of(case, name):
    made = case()
    for prepare in ("setup_method", "setUp"):
        if hasattr(made, prepare):
            getattr(made, prepare)()
    return getattr(made, name)


def fixture(function):
    value = function()
    return next(value) if hasattr(value, "gi_frame") else value


def run_cases(case):
    import unittest

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    if result.errors or result.failures or not result.testsRun:
        (_, why), *_ = [*result.errors, *result.failures, (None, "no tests")]
        raise AssertionError(why.strip().splitlines()[-1])


def imports(node):
    """The top modules that a statement imports, but those in a `try`, which is ready for their absence."""
    for part in ast.walk(node) if not isinstance(node, ast.Try) else ():
        if isinstance(part, ast.Import):
            yield from (alias.name.split(".")[0] for alias in part.names)
        elif isinstance(part, ast.ImportFrom) and part.module and not part.level:
            yield part.module.split(".")[0]


def same(value: Any, wanted: Any, tolerance: float) -> bool:
    """Equal, where JSON has one kind of list and only text as keys, within a tolerance of numbers."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(wanted, list | tuple):
        fits = isinstance(value, list | tuple) and len(value) == len(wanted)
        return fits and all(same(one, other, tolerance) for one, other in zip(value, wanted))
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            return False
        ours, theirs = ({str(key): item for key, item in one.items()} for one in (value, wanted))
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key], tolerance) for key in theirs)
    numbers = all(type(one) in (int, float) for one in (value, wanted))
    if value == wanted or not numbers or tolerance <= 0:
        return bool(value == wanted) or (numbers and value != value and wanted != wanted)
    return math.isclose(value, wanted, rel_tol=tolerance, abs_tol=tolerance)


def described(error):
    try:
        if isinstance(error, Late):
            return str(error)
        return f"{type(error).__name__}: {error}"[:500]
    except BaseException:
        return type(error).__name__
