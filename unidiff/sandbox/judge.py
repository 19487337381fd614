"""Runs tests on code: apart from it where that is exact (exact.py), else beside it (weak.py). One verdict a test.

Everything here has read the tests, so the process of the code is started before they are read.
"""

import ast
import builtins
import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import candidate
import exact
import stand_in
import translate
import weak
import wire

UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


def judge(reports):
    """Reads the job from stdin: {"code", "tests", "setup", "calls", "tolerance"}. Writes one line a verdict."""
    requests, replies = os.pipe(), os.pipe()
    if os.fork() == 0:
        try:
            candidate.alone(requests[0], replies[1])
            candidate.serve(os.fdopen(requests[0], "rb"), replies[1])
        finally:
            os._exit(0)
    os.close(requests[0])
    os.close(replies[1])
    with open(0, "rb") as file:
        job = json.load(file)
    candidate.silence()
    link = exact.Link(requests[1], os.fdopen(replies[0], "rb"))
    link.send(job["code"])
    for index, verdict in enumerate(Judge(link, job).verdicts()):
        candidate.send(reports, json.dumps({"test": index, **verdict}).encode() + b"\n")


class Unjudged(Exception):
    """This test says nothing about the code, or needs what is not here."""


class Judge:
    """Tests and the code, read. names: what the tests use of the code."""

    def __init__(self, link, job):
        self.link, self.job = link, job
        self.code = parsed(job["code"])
        sys.modules.setdefault("pytest", sys.modules.get("pytest") or imported("pytest") or stand_in.module())

    def verdicts(self) -> Iterator[dict[str, Any]]:
        """One verdict a call or test."""
        for case in self.job["calls"]:
            yield self.call(*(wire.decode(part, None) for part in case))
        if not self.job["tests"]:
            return
        pieces = []
        try:
            setup = translate.Piece(self.job["setup"])
        except UNREADABLE as error:
            setup = error
        for text in self.job["tests"]:
            try:
                if isinstance(setup, BaseException):
                    raise Unjudged(f"the set-up: {described(setup)}") from setup
                pieces.append(self.piece(text, setup))
            except (Unjudged, *UNREADABLE) as error:
                pieces.append(error)
        self.prepare([setup, *pieces])
        for piece in pieces:
            yield self.verdict(piece)

    def prepare(self, pieces):
        """Finds what the tests use of the code, and runs the set-up."""
        readable = [piece for piece in pieces if isinstance(piece, translate.Piece)]
        if not readable:
            return
        self.setup = pieces[0]
        self.modules = translate.modules(readable)
        names = set().union(*(piece.names for piece in readable)) - self.modules.keys() - self.setup.defined
        self.named = frozenset(names or translate.tested_builtins(readable))
        self.setup_failure = self.exactly(self.setup, first=True)

    def piece(self, text, setup):
        piece = translate.Piece(text)
        if not translate.asserts(piece, setup):
            raise Unjudged("it asserts nothing")
        for name in translate.fixtures(piece, setup):
            raise Unjudged(f"it needs the fixture {name}, which is not defined")
        for node in piece.tree.body:
            for name in imports(node):
                if name != translate.SOLUTION and name not in sys.modules and imported(name) is None:
                    raise Unjudged(f"it imports {name}, which is not installed; the sandbox has `paths` for packages")
        return piece

    def verdict(self, piece) -> dict[str, Any]:
        if not isinstance(piece, translate.Piece):
            return {"unjudged": described(piece) if not isinstance(piece, Unjudged) else str(piece)}
        if not piece.used & (self.named | self.setup.defined):
            return {"unjudged": "it uses nothing of the code"}
        if self.setup_failure and "weak" not in self.setup_failure:
            return self.setup_failure
        why = self.setup_failure.get("weak") or translate.shares_interpreter(piece, self.named)
        found = {"weak": why} if why else self.exactly(piece)
        return self.weakly(piece, found["weak"]) if "weak" in found else found

    # --- apart ---

    def exactly(self, piece, first=False) -> dict[str, Any]:
        """Runs a piece apart from the code. first: it is the set-up, whose names are kept; {} if it went well."""
        link = self.link
        link.begin()
        why = translate.shares_interpreter(piece, self.named) if first else None
        if why:
            return {"weak": why}
        try:
            space = {"__name__": "test", **link.names()} if first else dict(self.space)
            for name in self.named:
                space.setdefault(name, exact.Remote(link, name))
            if first:
                provide(self.modules, space)
                self.space = space
            space |= {own: exact.Remote(link, name) for name, own in piece.imports.items()}
            run(piece, translate.Noted(), space)
        except BaseException as error:
            over = isinstance(error, SystemExit) and not error.code and not link.left  # the test has ended itself
            if not over or not link.calls:
                return self.failed(error, first)
        if link.failed or link.open:
            return self.failed(AssertionError("an assertion that the test itself has caught"), first)
        if link.reason:
            return {"weak": link.reason}
        return {} if first else {"passed": True}

    def failed(self, error, first):
        link = self.link
        why = None if isinstance(error, exact.Halt) or link.ended else link.uncertain()
        if why:
            return {"weak": why}
        if not link.calls and not isinstance(error, AssertionError):
            return {"unjudged": ("the set-up: " if first else "") + described(error)}
        return {"passed": False, "message": described(error)}

    # --- beside ---

    def weakly(self, piece, why):
        """Runs a test in a new interpreter beside the code; a new one for each test."""
        refused = "it does not parse" if self.code is None else weak.trick(self.code)
        if refused:
            return {"passed": False, "weak": why, "message": refused}
        ours, theirs = os.pipe()
        token = os.urandom(16)
        child = os.fork()
        if child == 0:
            try:
                candidate.alone(theirs)
                failure = self.beside(piece)
            except BaseException as error:
                failure = described(error)
            os.write(theirs, token + (failure or "").encode(errors="replace")[:2000])
            os._exit(0)
        os.close(theirs)
        os.waitpid(child, 0)
        os.set_blocking(ours, False)
        try:
            said = os.read(ours, 4096)
        except BlockingIOError:
            said = b""
        os.close(ours)
        if said == token:
            return {"passed": True, "weak": why}
        ended = not said.startswith(token)
        message = "the code has ended the test" if ended else said[len(token) :].decode(errors="replace")
        return {"passed": False, "weak": why, "message": message}

    def beside(self, piece):
        """Why the test fails beside the code; None if it passes."""
        guard = weak.Guard(self.named | piece.defined | self.setup.defined)
        genuine = {f"_builtin_{name}": getattr(builtins, name) for name in translate.GENUINE} | guard.names()
        if "unittest" in self.setup.text + piece.text:
            guard.watch_unittest()
        module = candidate.module_of(self.job["code"], translate.SOLUTION)
        space = module.__dict__
        space |= genuine | {"__name__": "test"}
        for name in self.named - space.keys():
            with contextlib.suppress(NameError):
                space[name] = candidate.found(module, name)
        provide(self.modules, space)
        for one in (self.setup, piece):
            space |= {own: space[name] for name, own in one.imports.items() if name in space}
            run(one, translate.Guarded(self.named | one.defined | self.setup.defined), space)
        return "AssertionError" if guard.failed or guard.open else None

    # --- calls ---

    def call(self, name, arguments, wanted):
        """One call of a function by its arguments, and the value that it is to give."""
        self.link.begin()
        try:
            value = exact.Remote(self.link, name)(*arguments)
            if isinstance(value, exact.Items):
                value = list(value)
            right = any(same(value, one, self.job["tolerance"]) for one in wanted)
        except exact.NotPlain:
            return {"passed": False, "message": "the result is not plain data"}
        except BaseException as error:
            return {"passed": False, "message": described(error)}
        return {"passed": True} if right else {"passed": False, "message": f"it gave {value!r:.200}"}


def provide(modules, space):
    for statement in modules.values():
        exec(compile(ast.fix_missing_locations(statement), "imports", "exec"), space)


def run(piece, transformer, space):
    """Runs a test's statements, then the test functions and classes that it defines."""
    if "unittest" in sys.modules:
        vars(sys.modules["unittest"])["main"] = lambda *_, **__: None
    cases = piece.cases()
    exec(translate.program(piece, transformer), space)
    for name in cases:
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


def imported(name):
    try:
        return __import__(name)
    except ImportError:
        return None


def parsed(code):
    try:
        return ast.parse(code)
    except UNREADABLE:
        return None


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
        return f"{type(error).__name__}: {error}"[:500]
    except BaseException:
        return type(error).__name__
