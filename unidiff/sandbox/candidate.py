"""The side of the code under test: runs it, then answers calls of its functions. It never sees a test."""

import builtins
import collections
import itertools
import json
import os
import sys
import types

import wire

MUTABLE = (list, dict, set, bytearray, collections.deque, collections.Counter, collections.defaultdict,
           collections.OrderedDict)  # fmt: skip


def module_of(code, name):
    """A new module in which the code has run. `exit()` is the end of the code, not a fault."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    try:
        exec(compile(code, f"{name}.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        if name == "__main__":
            raise
    return module


def run_program(code):
    """The code as the main module. Its end is the end of the process."""
    sys.argv = ["program.py"]
    module_of(code, "__main__")


def found(module, name):
    """What a name means: something of the module, or a method of its class `Solution`. NameError if neither."""
    if name in module.__dict__:
        return module.__dict__[name]
    solution = module.__dict__.get("Solution")
    if isinstance(solution, type) and hasattr(solution, name):
        return getattr(solution(), name)
    raise NameError(f"name {name!r} is not defined by the code")


class Server:
    """Answers requests, one JSON line each. kept: what the tests hold by number."""

    def __init__(self, code):
        self.kept, self.failure = [], None
        try:
            self.module = module_of(code, "solution")
        except BaseException as error:
            self.failure = self.fault(error)

    def answer(self, request):
        if self.failure:
            return self.failure
        try:
            if "next" in request:
                items = itertools.islice(self.kept[request["next"]], 1)
                return {"item": [wire.encode(item, self.keep) for item in items]}
            parts = ("function", "arguments", "named")
            function, arguments, named = (wire.decode(request[part], self.find) for part in parts)
            value, given = function(*arguments, **named), dict(enumerate(arguments)) | named
            changed = self.changed(given, dict(enumerate(request["arguments"])) | dict(request["named"]["dict"]))
            for place, one in given.items():
                if one is value and type(one) in MUTABLE:  # the test gets its own argument back
                    return {"same": place, "changed": changed}
            return {"value": wire.encode(value, self.keep), "changed": changed}
        except BaseException as error:
            return self.fault(error)

    def changed(self, given, before):
        """Place and value of the arguments that the function has changed."""
        mutable = {place: one for place, one in given.items() if type(one) in MUTABLE or hasattr(one, "dtype")}
        after = {place: wire.encode(one, self.keep) for place, one in mutable.items()}
        return [[place, one] for place, one in after.items() if one != before[place]]

    def find(self, place, *_):
        return found(self.module, place) if isinstance(place, str) else self.kept[place]

    def keep(self, value):
        """A handle for what is not plain, with the plain value that it extends, its class and whether it iterates."""
        self.kept.append(value)
        plain = next((kind for kind in wire.PLAIN[2:] if isinstance(value, kind)), None)
        claim = None if plain is None else [wire.encode(plain(value), self.keep)]
        iterates = hasattr(type(value), "__next__") and type(value).__module__ in ("builtins", "itertools")
        return {"remote": [len(self.kept) - 1, claim, type(value).__name__, iterates]}

    def fault(self, error):
        """An exception as its nearest builtin class and its arguments. own: it is of another class."""
        kind = next(c for c in type(error).__mro__ if vars(builtins).get(c.__name__) is c)
        try:
            message = str(error)[:500]
            arguments = wire.encode(list(error.args), lambda value: repr(value)[:500])
        except BaseException:
            message, arguments = "", []
        return {"error": kind.__name__, "own": kind is not type(error), "arguments": arguments, "message": message}


def serve(requests, replies):
    """The code is the first line of the requests."""
    server = Server(json.loads(requests.readline()))
    for line in requests:
        try:
            reply = json.dumps(server.answer(json.loads(line)))
        except (RecursionError, ValueError, MemoryError) as error:
            reply = json.dumps({"error": type(error).__name__, "own": False, "arguments": [], "message": "the reply"})
        send(replies, reply.encode() + b"\n")


def send(fd, data):
    while data:
        data = data[os.write(fd, data) :]


def alone(*kept):
    """Closes all descriptors but these; standard streams lead nowhere."""
    first = 3
    for fd in [*sorted(kept), 1 << 16]:
        os.closerange(first, fd)
        first = fd + 1
    silence()


def silence():
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
