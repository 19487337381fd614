"""The side of the tests: a name of the code becomes a `Name`, whose calls run in the code's own process.

Arguments and results cross as plain data (wire.py), so a test sees genuine values of built-in types, and nothing that
the code does to its own interpreter reaches the one that judges. A test that needs more cannot be judged here
(`NotPlain`).
"""

import builtins
import contextlib
import json
import os
import select
import signal

import wire
from candidate import fork_server, send

LONGEST_REPLY = 64 << 20  # bytes
STOP_SECONDS = 0.3
HIDDEN = ("StopIteration", "StopAsyncIteration", "GeneratorExit")  # they would steer the test instead of failing it


class Halt(BaseException):
    """The code under test has ended its process, or sent what is not of the protocol."""


class Assertions:
    """What became of a test's assertions. failed: one was false. open: conditions that were begun and raised, where
    the test swallows that."""

    failed, open = False, 0

    def names(self):
        return {"begun": self.begun, "noted": self.noted}

    def begun(self, swallowed):
        self.open += swallowed
        return swallowed

    def noted(self, swallowed, value):
        self.open -= swallowed
        truth = bool(value)
        self.failed |= not truth
        return truth


class Link(Assertions):
    """The tests' end of the two pipes, and what is known about the test that runs.

    calls: calls that it made. waiting: one has not answered. reason: why it needs the code's interpreter. raised: what
    the code raised last. handles: it got objects of the code. shared: the code keeps something that it got or gave, or
    the test holds a part of what the code has changed; here they have copies.
    """

    def __init__(self):
        self.child, self.requests, self.replies = fork_server()
        self.ended = False
        self.begin()

    def names(self):
        return {**super().names(), "seen": self.seen}

    def seen(self, value):
        return Name.refuse(value) if type(value) is Name else value

    def begin(self):
        self.calls, self.reason, self.raised, self.handles, self.shared = 0, None, None, False, False
        self.failed, self.open, self.waiting = False, 0, False

    def stop(self):
        """Stops the call that runs. If the process does not answer at once, it is ended."""
        if self.waiting and not self.ended:
            self.ended = True
            with contextlib.suppress(OSError):
                os.kill(self.child, signal.SIGUSR1)
                if select.select([self.replies], [], [], STOP_SECONDS)[0]:
                    self.ended = not self.replies.readline(LONGEST_REPLY).endswith(b"\n")
                if self.ended:
                    os.kill(self.child, signal.SIGKILL)

    def send(self, message):
        try:
            send(self.requests, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            self.ended = True

    def ask(self, request):
        self.calls += 1
        if not self.ended:
            self.send(request)
        self.waiting = True
        line = b"" if self.ended else self.replies.readline(LONGEST_REPLY)
        self.waiting = False
        if not line.endswith(b"\n"):
            self.ended = True
            raise self.halt("the code under test has ended" if not line else "a result is too long")
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise self.halt(f"a result cannot be read: {error}") from None

    def defined(self, names):
        """Those of the names that the code defines; all where it does not say."""
        reply = self.ask({"defined": list(names)})
        return set(reply["defined"]) if isinstance(reply.get("defined"), list) else set(names)

    def call(self, name, arguments, named, items=False):
        """What a function of the code gives. items: as a list, if it is an iterator."""
        sent = [wire.encode(one, self.name_of) for one in (list(arguments), named)]
        reply = self.ask({"call": {"name": [name]}, "args": sent[0], "named": sent[1], "items": items})
        if "not_plain" in reply:
            raise self.not_plain(str(reply["not_plain"]))
        try:
            given = dict(enumerate(arguments)) | named
            changed = {place: wire.decode(after, self.handle) for place, after in reply.get("changed", ())}
            self.shared |= bool(reply.get("shared")) or any(wire.shared(given[place]) for place in changed)
            for place, after in changed.items():
                restore(given[place], after)
            if "error" not in reply:
                return given[reply["same"]] if "same" in reply else wire.decode(reply["value"], self.handle)
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, ImportError) as error:
            raise self.halt(f"a result cannot be read: {type(error).__name__}: {error}") from None
        raise self.error(reply["error"], reply["arguments"], reply["message"])

    def handle(self, place):
        self.handles = True
        return Name(self, int(place))

    def error(self, error, arguments, message):
        """What the code raised."""
        kind = getattr(builtins, error, None)
        if error in HIDDEN or not (isinstance(kind, type) and issubclass(kind, BaseException)):
            self.raised = RuntimeError(f"{error}: {message}")
        else:
            try:
                self.raised = kind(*wire.decode(arguments))
            except Exception:
                self.raised = RuntimeError(message)
        return self.raised

    def halt(self, reason):
        self.failed = True  # also where a test's `except:` takes it
        self.raised = Halt(reason)
        return self.raised

    def name_of(self, value):
        if type(value) is not Name:
            raise self.not_plain(f"the test hands over a {type(value).__name__}")
        return {"name": [value.name]}

    def not_plain(self, reason):
        self.reason = self.reason or reason
        return wire.NotPlain(reason)


def restore(argument, after):
    """Does to an argument what the call did to its copy: functions may work in place."""
    if type(argument) is not type(after) or (isinstance(after, tuple) and len(argument) != len(after)):
        raise ValueError("an argument has changed its type")
    if isinstance(argument, tuple):
        for part, new in zip(argument, after):
            if wire.can_change(part):
                restore(part, new)
    elif isinstance(argument, (list, bytearray)):
        argument[:] = after
    elif hasattr(argument, "dtype"):
        argument[...] = after
    else:
        argument.clear()
        argument.extend(after) if hasattr(argument, "extend") else argument.update(after)


class Name:
    """A name of the code, or an object that it gave, by its number. It can be called, and handed back to the code."""

    def __init__(self, link, name):
        vars(self).update({"link": link, "name": name} | ({"__name__": name} if isinstance(name, str) else {}))

    def __call__(self, *arguments, **named):
        return self.link.call(self.name, arguments, named)

    def __getattr__(self, attribute):
        raise self.link.not_plain(f"the test uses {attribute} of something of the code")

    def refuse(self, *_):
        raise self.link.not_plain("the test looks at something of the code")

    __eq__ = __ne__ = __bool__ = __hash__ = __str__ = __repr__ = __iter__ = __setattr__ = refuse  # type: ignore
    __class__ = property(refuse)  # type: ignore[assignment]
