"""The side of the tests: names of the code become `Remote`s, whose calls run in the code's own process.

Arguments and results cross as plain data (wire.py), so a test sees genuine values of built-in types, and nothing that
the code does to its own interpreter reaches the one that judges. What is not plain stays behind a handle. A test that
asks such a thing for more than a comparison with plain data cannot be judged here: `NotPlain`.
"""

import builtins
import itertools
import json
import os

import wire

LONGEST_REPLY = 64 << 20  # bytes
LONGEST_ITERATOR = 100_000
HIDDEN = ("StopIteration", "StopAsyncIteration", "GeneratorExit")  # they would steer the test instead of failing it


class NotPlain(BaseException):
    """This test has to share an interpreter with the code."""


class Halt(BaseException):
    """The code under test has ended its process, or sent what is not of the protocol."""


class Assertions:
    """What became of a test's assertions. failed: one was false. open: conditions that were begun and raised."""

    failed, open = False, 0

    def names(self):
        return {"_noted": self.noted, "_begun": self.begun}

    def begun(self):
        self.open += 1
        return self.begun

    def noted(self, *values):
        self.open -= len(values) - 1
        truth = bool(values[-1])
        self.failed |= not truth
        return truth


class Link(Assertions):
    """The tests' end of the two pipes, and what is known about the test that runs.

    calls: calls that it made. reason: why it needs the code's interpreter. foreign: an exception crossed that is not
    of a builtin class. failed: whatever the test makes of it. left: the code raised SystemExit. objects: it got some of
    the code's. compared: with plain data, which is all that can be asked of them here.
    """

    def __init__(self, requests, replies):
        self.requests, self.replies = requests, replies
        self.ended = False
        self.begin()

    def begin(self):
        self.calls, self.reason, self.open = 0, None, 0
        self.foreign = self.left = self.failed = self.objects = self.compared = False

    def uncertain(self):
        """Why a test that has failed here may pass beside the code; None if it may not."""
        if self.objects and not self.compared:
            return self.reason or "the test looks at objects of the code"
        return self.reason or ("the code raised an exception that is not a builtin" if self.foreign else None)

    def send(self, message):
        data = json.dumps(message).encode() + b"\n"
        try:
            while data and not self.ended:
                data = data[os.write(self.requests, data) :]
        except BrokenPipeError:
            self.ended = True

    def ask(self, request):
        self.calls += 1
        self.send(request)
        line = b"" if self.ended else self.replies.readline(LONGEST_REPLY)
        if not line.endswith(b"\n"):
            self.ended = True
            raise self.halt("the code under test has ended" if not line else "a result is too long")
        try:
            reply = dict(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise self.halt(f"a result cannot be read: {error}") from None
        if "error" in reply:
            self.error(**reply)
        return reply

    def error(self, error, own, arguments, message):
        """Raises what the code raised, as its nearest builtin class."""
        kind = getattr(builtins, error, None)
        if error in HIDDEN or not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise RuntimeError(f"{error}: {message}")
        self.foreign |= bool(own)
        self.left |= issubclass(kind, (SystemExit, KeyboardInterrupt))
        try:
            raised = kind(*wire.decode(arguments, self.refuse))
        except Exception:
            raised = RuntimeError(message)
        raise raised

    def names(self):
        return {**super().names(), "_seen": self.seen}

    def seen(self, value):
        if type(value) in (Remote, Items):
            raise self.not_plain("the test looks at something of the code")
        return value

    def refuse(self, *_):
        raise ValueError("an exception holds a handle")

    def call(self, function, arguments, named):
        callee = _place(function)
        sent = [wire.encode(one, self.place) for one in (list(arguments), named)]
        reply = self.ask({"function": {"remote": [callee]}, "arguments": sent[0], "named": sent[1]})
        given = dict(enumerate(arguments)) | named
        for place, after in reply.get("changed", ()):
            restore(given[place], self.value(after, callee))
        same = reply.get("same")
        return self.value(reply.get("value"), callee) if same is None else given[same]

    def value(self, data, callee=None):
        """What a reply holds. callee: the name that was called; an object of this class was made by the test."""

        def remote(handle, claim, kind, iterates):
            plain = () if claim is None else (wire.decode(claim[0], remote),)
            self.objects |= not iterates
            return Items(self, handle) if iterates else Remote(self, handle, plain, kind == callee)

        try:
            return wire.decode(data, remote)
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, ImportError) as error:
            raise self.halt(f"a result cannot be read: {type(error).__name__}: {error}") from None

    def halt(self, reason):
        self.failed = True  # also where a test's `except:` takes it
        return Halt(reason)

    def place(self, value):
        """How the code knows a value of the tests that is not plain."""
        if type(value) in (Remote, Items):
            return {"remote": [_place(value)]}
        if hasattr(type(value), "__next__"):
            items = list(itertools.islice(value, LONGEST_ITERATOR))
            if len(items) < LONGEST_ITERATOR:
                return {"iterator": [wire.encode(item, self.place) for item in items]}
        raise self.not_plain(f"the test hands over a {type(value).__name__}")

    def not_plain(self, reason):
        self.reason = self.reason or reason
        return NotPlain(reason)


def restore(argument, after):
    """Does to an argument what the call did to its copy: functions may work in place."""
    if type(argument) is not type(after):
        raise ValueError("an argument has changed its type")
    if isinstance(argument, (list, bytearray)):
        argument[:] = after
    elif hasattr(argument, "dtype"):
        argument[...] = after
    else:
        argument.clear()
        argument.extend(after) if hasattr(argument, "extend") else argument.update(after)


def _place(remote):
    return object.__getattribute__(remote, "_place")


class Items:
    """An iterator of the code: each item is asked for when it is needed, so that endless ones work."""

    def __init__(self, link, place):
        self._link, self._place = link, place

    def __iter__(self):
        return self

    def __next__(self):
        link = object.__getattribute__(self, "_link")
        found = link.ask({"next": _place(self)}).get("item")
        if not found:
            raise StopIteration
        return link.value(found[0])

    def __getattribute__(self, name):
        if name in ("__iter__", "__next__"):
            return object.__getattribute__(self, name)
        raise object.__getattribute__(self, "_link").not_plain(f"the test uses {name} of an iterator of the code")


class Remote:
    """A name of the code, or an object that lives with it. It can be called, handed back to the code, and compared.

    plain: the plain value that it extends, if any. made: it came from a call of its class.
    """

    def __init__(self, link, place, plain=(), made=False):
        for name, value in (("_link", link), ("_place", place), ("_plain", plain), ("_made", made)):
            object.__setattr__(self, name, value)

    def __call__(self, *arguments, **named):
        return object.__getattribute__(self, "_link").call(self, arguments, named)

    def __eq__(self, other):
        link, made, plain = (object.__getattribute__(self, name) for name in ("_link", "_made", "_plain"))
        theirs = object.__getattribute__(other, "_plain") if type(other) is Remote else (other,)
        comparable = theirs and wire.is_plain(theirs[0]) and (plain or type(other) is not Remote)
        if made or isinstance(_place(self), str) or not comparable:
            raise link.not_plain("the test compares objects of the code")
        link.compared = True
        return bool(plain) and plain[0] == theirs[0]

    def __ne__(self, other):
        return not self == other

    def __getattribute__(self, name):
        if name == "__name__" and isinstance(_place(self), str):
            return _place(self)
        raise object.__getattribute__(self, "_link").not_plain(f"the test uses {name} of something of the code")


def _refusing(name):
    def method(self, *_):
        raise object.__getattribute__(self, "_link").not_plain(f"the test uses {name} of something of the code")

    return method


BINARY = "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or"
OTHERS = """len length_hint iter next reversed contains getitem setitem delitem bool hash repr str format bytes int
float complex index round trunc floor ceil abs neg pos invert lt le gt ge enter exit aenter aexit aiter anext await
get set delete setattr delattr instancecheck subclasscheck mro_entries dir"""
for _name in [*OTHERS.split(), *(prefix + name for prefix in ("", "r", "i") for name in BINARY.split())]:
    setattr(Remote, f"__{_name}__", _refusing(f"__{_name}__"))
