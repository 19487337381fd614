"""What runs inside the sandbox: a program, the functions under test, or the tests. Standard library alone.

Functions and tests live in two sandboxes and exchange plain data, one JSON line a message: the tests call the functions
through `Remote`, and get back values of built-in types only. So nothing that the functions do to their own interpreter
(builtins, `__eq__`, frames, exits) reaches the process that judges them, and no expected value reaches theirs.
"""

import builtins
import itertools
import json
import os
import sys
import types

LONGEST_MESSAGE = 4 << 20  # bytes
LONGEST_ITERATOR = 100_000
MODULE = 0  # the handle of the module under test


class NotPlain(TypeError):
    """A test needs something that cannot cross: the test cannot judge, whatever the functions do."""


def run(job):
    {"program": run_program, "functions": serve_functions, "tests": run_tests}[job["mode"]](job)


def run_program(job):
    """The code as the main module; its end is the end of the process."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv = ["program.py"]
    exec(compile(job["code"], "program.py", "exec"), main.__dict__)


# --- plain data -------------------------------------------------------------------------------------------------------


def encode(value, keep=None):
    """A value as JSON can hold it. For what is no plain data `keep` gives a handle; without it NotPlain is raised."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is Remote:
        return {"remote": value.__dict__["_place"]}
    for kind in (bool, int, float, str):  # of a subclass, the plain value
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, list):
        return [encode(item, keep) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(k, keep), encode(v, keep)] for k, v in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, keep) for item in value]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if hasattr(type(value), "__next__"):
        return {"iterator": [encode(item, keep) for item in itertools.islice(value, LONGEST_ITERATOR)]}
    if keep is None:
        raise NotPlain(f"a {type(value).__name__} cannot be handed to the function under test")
    return {"remote": [keep(value)]}


DECODERS = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "iterator": iter,
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*parts),
}


def decode(data, find):
    """The value of what `encode` made. find: (handle, *path) -> what is kept there. ValueError for anything else."""
    if isinstance(data, list):
        return [decode(item, find) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ValueError("this is not of the protocol")
    ((kind, content),) = data.items()
    if kind == "remote":
        return find(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind not in DECODERS:
        raise ValueError(f"this holds a {kind!r}")
    return DECODERS[kind]([decode(item, find) for item in content])


# --- the functions under test -----------------------------------------------------------------------------------------


def serve_functions(job):
    """Runs the code, then answers calls until the tests are over."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    requests, replies = os.fdopen(job["requests"], "rb"), job["replies"]
    failure = None
    try:
        exec(compile(job["code"], "solution.py", "exec"), module.__dict__)
    except BaseException as error:
        failure = describe(error)
    kept = Kept([module])
    for line in requests:
        reply = failure or answer(json.loads(line), kept)
        send(replies, json.dumps(reply).encode() + b"\n")


class Kept(list):
    """What the tests know by handle; the module under test is the first."""

    def keep(self, value):
        self.append(value)
        return len(self) - 1

    def find(self, handle, *path):
        target = self[handle]
        for name in path:
            target = getattr(target, name)
        return target


def send(fd, data):
    while data:
        data = data[os.write(fd, data) :]


def describe(error):
    kind = next(c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins")
    return {"error": kind, "message": str(error)[:500]}


def answer(request, kept):
    try:
        function, arguments, named = (decode(request[name], kept.find) for name in ("function", "arguments", "named"))
        value = encode(function(*arguments, **named), kept.keep)  # type: ignore
        after = [encode(a, kept.keep) if type(a) in MUTABLE else None for a in arguments]
        return {"value": value, "arguments": after}
    except BaseException as error:
        return describe(error)


MUTABLE = (list, dict, set, bytearray)


# --- the tests --------------------------------------------------------------------------------------------------------


class Link:
    """The tests' end of the two pipes."""

    def __init__(self, requests, replies):
        self.requests, self.replies = requests, os.fdopen(replies, "rb")

    def call(self, function, arguments, named):
        request = {"function": encode(function), "arguments": encode(list(arguments)), "named": encode(named)}
        try:
            send(self.requests, json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise RuntimeError("the code under test has ended") from None
        line = self.replies.readline(LONGEST_MESSAGE)
        if not line.endswith(b"\n"):
            raise RuntimeError("the code under test has ended" if not line else "the reply is too long")
        return json.loads(line)


class Remote:
    """A function, class or object that lives with the code under test. It can be called, and its attributes too."""

    def __init__(self, link, handle, *path):
        self.__dict__.update(_link=link, _place=[handle, *path])

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Remote(self.__dict__["_link"], *self.__dict__["_place"], name)

    def __bool__(self):
        raise TypeError("an object of the code under test is neither true nor false here; compare plain values")

    def __call__(self, *arguments, **named):
        link = self.__dict__["_link"]

        def find(handle, *path):
            return Remote(link, handle, *path)

        reply = link.call(self, arguments, named)
        if "error" in reply:
            raise error_of(str(reply["error"]), str(reply.get("message")))
        for argument, after in zip(arguments, reply["arguments"]):
            restore(argument, decode(after, find))
        return decode(reply["value"], find)


def error_of(name, message):
    """The builtin exception of this name; a RuntimeError for any other, and for those that take more than a message."""
    kind = getattr(builtins, name, RuntimeError)
    usable = isinstance(kind, type) and issubclass(kind, Exception)
    return kind(message) if usable and not issubclass(kind, (AssertionError, UnicodeError)) else RuntimeError(message)


def restore(argument, after):
    """Does to an argument what the call did to its copy: functions may work in place."""
    if type(argument) is not type(after) or argument == after:
        return
    if isinstance(argument, (list, bytearray)):
        argument[:] = after
    elif isinstance(argument, (dict, set)):
        argument.clear()
        argument.update(after)


def run_tests(job):
    """Runs each test in a copy of what the set-up made, and writes one verdict a line."""
    link = Link(job["requests"], job["replies"])
    names = {name: Remote(link, MODULE, name) for name in job["names"]}

    def verdict(**words):
        send(job["verdicts"], json.dumps(words).encode() + b"\n")

    try:
        exec(compile(job["setup"], "setup.py", "exec"), names)
    except BaseException as error:
        verdict(broken=f"the tests' set-up raised {type(error).__name__}: {error}")
        return
    for index, test in enumerate(job["tests"]):
        try:
            program = compile(test, f"test {index}", "exec")
        except (SyntaxError, ValueError) as error:
            verdict(test=index, unjudged=f"{type(error).__name__}: {error}")
            continue
        try:
            exec(program, dict(names))
        except (NotPlain, SystemExit) as error:  # the functions under test can cause neither
            verdict(test=index, unjudged=f"{type(error).__name__}: {error}")
        except BaseException as error:
            verdict(test=index, passed=False, message=f"{type(error).__name__}: {error}"[:500])
        else:
            verdict(test=index, passed=True)
